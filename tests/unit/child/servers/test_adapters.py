"""Which server serves an application."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from steer.child.launch import Unloadable
from steer.child.servers import adapters
from steer.config.applications import Interface, interface_of
from steer.config.service import FIELDS, Service

ALL = (Interface.ASGI3, Interface.ASGI2, Interface.WSGI)


async def asgi3(scope: Any, receive: Any, send: Any) -> None: ...


def asgi2(scope: Any) -> None: ...


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    return []


def decorated(*args: Any, **kwargs: Any) -> None: ...


def serve(worker: Any) -> None: ...


def test_each_server_of_the_configuration_has_an_adapter() -> None:
    allowed = {name for each in get_args(FIELDS["server"].type) for name in get_args(each)}
    assert {*adapters.SERVERS, "auto"} == allowed


@pytest.mark.parametrize(
    "found, allowed, interface",
    [
        (asgi3, ALL, Interface.ASGI3),
        (asgi2, ALL, Interface.ASGI2),
        (wsgi, ALL, Interface.WSGI),
        (wsgi, (Interface.ASGI3, Interface.ASGI2), None),
        (asgi3, (Interface.WSGI,), None),
        (serve, ALL, None),
        (decorated, (Interface.ASGI3,), Interface.ASGI3),
        (decorated, (Interface.WSGI,), Interface.WSGI),
    ],
)
def test_interface(found: Any, allowed: tuple[Interface, ...], interface: Interface | None) -> None:
    assert interface_of(found, allowed) is interface


@pytest.mark.parametrize(
    "found, server, said",
    [
        (
            wsgi,
            "uvicorn",
            "uvicorn serves ASGI 3 and ASGI 2; it looks like a WSGI .* waitress",
        ),
        (asgi2, "hypercorn", "hypercorn serves ASGI 3 and WSGI; .* ASGI 2 .* use --server uvicorn"),
        (serve, "waitress", "waitress serves WSGI; .* function of the worker.* leave out --server"),
        (lambda: None, "auto", r"it takes no argument.* 'm:a\(\)'"),
    ],
)
def test_what_a_server_does_not_serve(found: Any, server: Any, said: str) -> None:
    with pytest.raises(Unloadable, match=said):
        adapters.load(found, Service(app="m:a", server=server))
