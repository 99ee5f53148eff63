"""A FastAPI application as its users write it: lifespan, websocket, stream."""

import asyncio
import os
import pathlib
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse


def note(what):
    with open("events", "a") as file:
        file.write(f"{what} {os.getpid()}\n")


@asynccontextmanager
async def lifespan(app):
    note("started")
    yield
    note("ended")


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def root(request: Request) -> dict[str, object]:
    client = request.client.host if request.client else ""
    return {
        "slot": int(os.environ["STEER_SLOT"]),
        "pid": os.getpid(),
        "scheme": request.url.scheme,
        "http": request.scope["http_version"],
        "client": client,
    }


@app.get("/stream")
async def stream():
    async def lines():
        yield "first\n"
        while not pathlib.Path("go").exists():
            await asyncio.sleep(0.01)
        yield "last\n"

    return StreamingResponse(lines())


@app.websocket("/ws")
async def echo(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(f"{os.getpid()} {text}")
