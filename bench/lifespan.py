"""The smallest ASGI application with a lifespan. It writes down when a worker has started."""

from __future__ import annotations

import os

from bench.apps import asgi as answer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

STARTED = "STEER_BENCH_STARTED"
"""The variable with the path of the file that gets a line for each worker."""


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "lifespan":
        await answer(scope, receive, send)
        return
    while True:
        event = (await receive())["type"]
        if event == "lifespan.startup":
            with open(os.environ[STARTED], "a") as file:
                file.write(f"{os.getpid()}\n")
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return
