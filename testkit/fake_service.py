"""What stands at a control socket in place of a service: handlers, or words, of the test's own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer.control.server import Handler, Server
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from testkit.processes import DEADLINE_S


@contextmanager
def fake_service(path: Path, **commands: Handler) -> Iterator[asyncio.AbstractEventLoop]:
    """Answer there with handlers by the name of their command, in a loop of its own."""
    running: asyncio.Future[None]

    async def serve() -> None:
        nonlocal running
        running = loop.create_future()
        async with Server(sock, commands, Retry(Log("error", "text"), Spare(0))):
            started.set()
            await running

    started, loop = threading.Event(), asyncio.new_event_loop()
    with _listening(path) as sock:
        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
        thread.start()
        assert started.wait(DEADLINE_S)
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(running.set_result, None)
            thread.join(DEADLINE_S)
            loop.close()


@contextmanager
def says(path: Path, words: bytes) -> Iterator[None]:
    """Say that to the first who asks there, whatever they ask."""

    def answer_once() -> None:
        connection, _ = sock.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(words)

    with _listening(path) as sock:
        thread = threading.Thread(target=answer_once, daemon=True)
        thread.start()
        yield
        thread.join(DEADLINE_S)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    path.parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock
    path.unlink(missing_ok=True)  # asyncio has done it from Python 3.13 on
