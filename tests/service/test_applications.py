"""Applications of other kinds, given as MODULE:CALLABLE: one error says what to type instead."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steer.config import applications
from testkit.clients import http_get
from testkit.fixtures import RunSteer, StartService
from testkit.programs import source


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


def asgi2(scope: Any) -> Asgi2:
    return Asgi2(scope)


def handler(request: Any) -> None: ...


AIOHTTP = type("Application", (), {"__module__": "aiohttp.web_app", "__call__": lambda self: self})

ASGI, WSGI = "--server uvicorn m:a", "--server waitress m:a"
FACTORY = "--server auto 'm:a()'"
REFUSED: list[tuple[Callable[..., Any], str, str]] = [
    (asgi3, "ASGI 3", ASGI),
    (Asgi3(), "ASGI 3", ASGI),
    (functools.partial(asgi3), "ASGI 3", ASGI),
    (asgi_behind_a_decorator, "ASGI 3", ASGI),
    (lambda scope, receive, send: None, "ASGI 3", ASGI),
    (Asgi2, "ASGI 2", ASGI),
    (asgi2, "ASGI 2", ASGI),
    (handler, "handler of requests", "worker.sockets"),
    (AIOHTTP(), "aiohttp", "-- gunicorn -w 1 --worker-class aiohttp.GunicornWebWorker m:a"),
    (Asgi3, "class of ASGI 3", FACTORY),
    (wsgi, "WSGI", WSGI),
    (Wsgi(), "WSGI", WSGI),
    (WsgiClass, "WSGI", WSGI),
    (lambda: None, "no argument", FACTORY),
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
        ("async def app(scope, receive, send): pass", "--server uvicorn m:app"),
        ("def app(environ, start_response): return []", "--server waitress m:app"),
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
    assert "WARNING" not in running.log


ANSWERS = source("applications")
TYPED = {
    **dict.fromkeys(
        ("function", "instance", "partial", "synchronous", "Application", "Asgi2", "asgi2"),
        "asgi",
    ),
    **dict.fromkeys(("wsgi", "plain", "WsgiClass", "Holder.application", "make_wsgi"), "wsgi"),
    "make_asgi": "asgi",
    "returns_asgi": "asgi",
}


@pytest.mark.needs("bpf", "uvicorn", "waitress")
@pytest.mark.parametrize("name, by", TYPED.items())
def test_what_to_type_serves_it(service: StartService, home: Path, name: str, by: str) -> None:
    """With the servers as they are."""
    (home / "m.py").write_text(ANSWERS)
    refused = service("-w", "2", f"m:{name}", ready=False)
    assert refused.wait() in (3, 4)
    typed = re.findall(r"steer run (--server .*)", refused.log)
    running = service("-w", "2", *shlex.split(typed[0]))
    assert http_get("127.0.0.1", 8080)[1]["by"] == by
    assert running.stop() == 0


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("async def f(w): pass\ndef app(w): return f(w)", "it returned a coroutine"),
        ("def f(w): yield\ndef app(w): return f(w)", "it returned a generator"),
        ("def app(w): return print", "it returned a callable, which nobody calls; if it"),
    ],
)
def test_what_returned_instead_of_serving_is_told(
    service: StartService, home: Path, source: str, wanted: str
) -> None:
    (home / "m.py").write_text(source + "\n")
    running = service("m:app", "-w", "2", ready=False)
    assert running.wait() == 3
    said = running.log.partition("steer: start workers: exit status 1\n")[2]
    assert f": m:app: {wanted}" in said
    assert "Warning" not in running.log.replace("WARNING", "")


def test_one_that_returns_at_once_is_told_to_serve(service: StartService, home: Path) -> None:
    (home / "m.py").write_text("def app(worker): pass\n")
    running = service("m:app", "-w", "2", ready=False)
    assert running.wait() == 3
    assert (
        "steer: start workers: exit status 0: the callable returned; have it serve until "
        "worker.stopping; see examples/\n" in running.log
    )


@pytest.mark.parametrize(
    "given, wanted",
    [
        (("uvicorn", "m:app"), "-- uvicorn m:app"),
        (("-b", ":80", "uvicorn", "m:app", "--fd", "{fd}"), "-b :80 -- uvicorn m:app --fd '{fd}'"),
        (("-w", "2", "gunicorn", "-w", "1", "m:app"), "-w 2 -- gunicorn -w 1 m:app"),
        (("cat",), "-- cat"),
        (("/bin/sh", "-c", "exec cat"), "-- /bin/sh -c 'exec cat'"),
        (("cat", "--", "m:app"), "-- cat m:app"),
        (("-w", "2", "sh", "-m", "x", "--", "m:app"), "-w 2 -- sh -m x m:app"),
        (("--", "-w", "2", "cat", "-n"), "-w 2 -- cat -n"),
        (("-b", ":80", "--", "--strict", "cat"), "-b :80 --strict -- cat"),
    ],
)
def test_forgotten_dashes(steer: RunSteer, given: tuple[str, ...], wanted: str) -> None:
    for command in ("run", "check"):
        done = steer(command, *given)
        assert done.returncode == 2
        assert f"A command goes after --: steer {command} {wanted}\n" in done.stderr


@pytest.mark.parametrize(
    "given",
    [("m:app", "cat"), ("nosuch", "-w", "2"), ("-u", "cat", "--bad"), ("nosuch", "--", "x")],
)
def test_nothing_is_taken_for_a_command_that_is_none(
    steer: RunSteer, given: tuple[str, ...]
) -> None:
    assert "A command goes after --: steer" not in steer("run", *given).stderr
