"""An application for ASGI servers."""

import asyncio
import json
import os
import pathlib


async def until(name):
    while not pathlib.Path(name).exists():
        await asyncio.sleep(0.01)


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            if "HOLD" in os.environ:
                await until("start-" + os.environ["STEER_SLOT"])
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/held":
        pathlib.Path("under-way").touch()
        await until("go")
    body = json.dumps({"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()}).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
