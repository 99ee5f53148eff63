"""The smallest services, as WSGI and as ASGI. Imports nothing that costs."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Any

BODY = b"hello\n"


def wsgi(_environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", str(len(BODY)))])
    return [BODY]


def blocking(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Keeps its worker for as many seconds as the path says: /0.05."""
    time.sleep(float(environ["PATH_INFO"][1:] or 0))
    return wsgi(environ, start_response)


async def asgi(
    _scope: dict[str, Any], _receive: object, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    await _answer(send, BODY)


async def whoami(
    _scope: dict[str, Any], _receive: object, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """Answers the worker's process id."""
    await _answer(send, b"%d" % os.getpid())


async def _answer(send: Callable[[dict[str, Any]], Awaitable[None]], body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
