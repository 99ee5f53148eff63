"""Applications of other kinds, given as MODULE:CALLABLE: one error says what to type instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RunSteer, StartService

from steer import applications


async def asgi3(scope: Any, receive: Any, send: Any) -> None: ...


class Asgi3:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Asgi2:
    def __init__(self, scope: Any) -> None: ...

    async def __call__(self, receive: Any, send: Any) -> None: ...


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    return []


class Wsgi:
    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        return []


class WsgiClass:
    def __init__(self, environ: Any, start_response: Any) -> None: ...


async def asgi_behind_a_decorator(*args: Any) -> None: ...


async def coroutine(worker: Any) -> None: ...


def generator(worker: Any) -> Iterator[None]:
    yield


def two(worker: Any, other: Any = None) -> None: ...


def anything(*args: Any, **kwargs: Any) -> None: ...


def keyword(worker: Any, *, needed: Any) -> None: ...


class Application:
    def __init__(self, worker: Any = None) -> None: ...

    def __call__(self, worker: Any) -> None: ...

    def method(self, worker: Any) -> None: ...

    @staticmethod
    def static(worker: Any) -> None: ...


class Hostile:
    @property
    def __signature__(self) -> object:
        raise RuntimeError("not for you")

    def __call__(self, *args: Any) -> None: ...


UVICORN, GUNICORN = "-- uvicorn m:a --fd {fd}", "-- gunicorn -w 1 m:a"
REFUSED: list[tuple[Callable[..., Any], str, str]] = [
    (asgi3, "ASGI 3", UVICORN),
    (Asgi3(), "ASGI 3", UVICORN),
    (functools.partial(asgi3), "ASGI 3", UVICORN),
    (asgi_behind_a_decorator, "ASGI 3", UVICORN),
    (lambda scope, receive, send: None, "ASGI 3", UVICORN),
    (Asgi2, "ASGI 2", UVICORN),
    (Asgi3, "class of ASGI 3", "-- uvicorn --factory m:a --fd {fd}"),
    (wsgi, "WSGI", GUNICORN),
    (Wsgi(), "WSGI", GUNICORN),
    (WsgiClass, "WSGI", GUNICORN),
    (lambda: None, "no argument", "-- gunicorn -w 1 'm:a()'"),
    (Wsgi, "class", "one argument, the worker"),
    (lambda a, b, c, d: None, "(a, b, c, d)", "one argument, the worker"),
    (keyword, "needed", "one argument, the worker"),
    (coroutine, "coroutine function", "asyncio.run"),
    (generator, "generator function", "without yield"),
]


@pytest.mark.parametrize("found, looks, cure", REFUSED)
def test_is_refused_with_what_to_type(found: Callable[..., Any], looks: str, cure: str) -> None:
    said = applications.why_not(found, "m:a")
    assert looks in said
    assert cure in said


@pytest.mark.parametrize(
    "found",
    [
        *(two, anything, Application, Application(), Application().method, Application.static),
        *(functools.partial(two, other=1), print, int, Hostile(), functools.partial(wsgi, {})),
    ],
)
def test_whatever_takes_one_argument_is_let_run(found: Callable[..., Any]) -> None:
    assert applications.why_not(found, "m:a") == ""


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("async def app(scope, receive, send): pass", "uvicorn m:app --fd {fd}"),
        ("def app(environ, start_response): return []", "gunicorn -w 1 m:app"),
    ],
)
def test_one_error_and_no_traceback(
    service: StartService, home: Path, source: str, wanted: str
) -> None:
    (home / "m.py").write_text(source + "\n")
    running = service("m:app", "-w", "3", ready=False)
    assert running.wait() == 4
    assert running.log.count(wanted) == 1
    assert "steer: load m:app: it looks like a" in running.log
    assert "Traceback" not in running.log


@pytest.mark.parametrize(
    "given, wanted",
    [
        (("uvicorn", "m:app"), "-- uvicorn m:app"),
        (("-b", ":80", "uvicorn", "m:app", "--fd", "{fd}"), "-b :80 -- uvicorn m:app --fd '{fd}'"),
        (("-w", "2", "gunicorn", "-w", "1", "m:app"), "-w 2 -- gunicorn -w 1 m:app"),
        (("cat",), "-- cat"),
        (("/bin/sh", "-c", "exec cat"), "-- /bin/sh -c 'exec cat'"),
    ],
)
def test_forgotten_dashes(steer: RunSteer, given: tuple[str, ...], wanted: str) -> None:
    for command in ("run", "check"):
        done = steer(command, *given)
        assert done.returncode == 2
        assert f"A command goes after --: steer {command} {wanted}\n" in done.stderr


@pytest.mark.parametrize("given", [("m:app", "cat"), ("nosuch", "-w", "2"), ("-u", "cat", "--bad")])
def test_nothing_is_taken_for_a_command_that_is_none(
    steer: RunSteer, given: tuple[str, ...]
) -> None:
    assert "A command goes after --: steer" not in steer("run", *given).stderr
