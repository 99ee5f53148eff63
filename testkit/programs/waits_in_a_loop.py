"""Waits."""

import asyncio
import os


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        if "GATE" in os.environ:
            print("starting up", flush=True)
            await asyncio.to_thread(os.read, 0, 1)  # noqa: TID251 - as an application might
        await send({"type": "lifespan.startup.complete"})
        await receive()


def wsgi(environ, start_response):
    start_response("200 OK", [])
    return []
