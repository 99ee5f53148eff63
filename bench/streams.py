"""A server of asyncio's streams, that writes head and body of an answer apart: under steer a
callable, by itself `python -m bench.streams PORT`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer.child.api import Worker

BODY = b"hello\n"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)


def serve(worker: Worker) -> None:
    asyncio.run(_serve(sock=worker.sockets[0]))


async def _serve(sock: socket.socket | None = None, port: int = 0) -> None:
    if sock is not None:
        server = await asyncio.start_server(_answer, sock=sock)
    else:
        server = await asyncio.start_server(_answer, "127.0.0.1", port)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
    with contextlib.suppress(asyncio.CancelledError):
        await server.serve_forever()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(_HEAD)
            writer.write(BODY)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


if __name__ == "__main__":
    asyncio.run(_serve(port=int(sys.argv[1])))
