"""The control socket: one request and one answer to a connection, each a line of JSON.

Requests are `{"command": NAME, ...}`; answers `{"ok": true, ...}` or
`{"ok": false, "error": TEXT}`. Only root and the user that runs the service are
answered.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from steer.errors import SteerError
from steer.kernel import rundir

REQUEST_MAX_BYTES = 65536
TIMEOUT_S = 5.0
"""For a request to be complete, and for an answer to be taken."""
SILENT_MAX = 32
"""So many connections may be without a request: descriptors are kept for workers."""
_AT_ONCE = 16

Handler = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


class Server:
    """Answers on a listening socket.

    Args:
        sock: listens; stays the caller's.
        commands: handlers by the name of the command.
    """

    def __init__(self, sock: socket.socket, commands: Mapping[str, Handler]) -> None:
        self._socket = sock
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._talks: set[asyncio.Task[Any]] = set()
        self._silent: dict[asyncio.Task[Any], None] = {}

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_unix_server(
            self._talk, sock=self._socket, limit=REQUEST_MAX_BYTES, backlog=_AT_ONCE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whoever still waits for an answer gets it first."""
        assert self._server is not None
        self._server.close()
        for silent in self._silent:
            silent.cancel()
        if self._talks:
            await asyncio.wait(self._talks, timeout=TIMEOUT_S)
        for talk in self._talks:
            talk.cancel()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        task.add_done_callback(self._talks.discard)
        try:
            answer = await self._answer(reader, writer.get_extra_info("socket"))
            writer.write(msgspec.json.encode(answer) + b"\n")
            await asyncio.wait_for(writer.drain(), TIMEOUT_S)
        except TimeoutError:
            writer.transport.abort()
        except ConnectionError:
            pass  # the asker has gone; what it asked for is done all the same
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, sock: socket.socket) -> Mapping[str, Any]:
        try:
            line = await self._line(reader)
            if not _is_trusted(sock):
                return _refusal("not permitted: only root and the service's own user may ask")
            request = msgspec.json.decode(line, type=dict[str, Any])
        except asyncio.LimitOverrunError:
            return _refusal(f"request too long: {REQUEST_MAX_BYTES} bytes at most")
        except (asyncio.IncompleteReadError, TimeoutError):
            return _refusal("request not complete: a line of JSON is wanted")
        except (msgspec.DecodeError, RecursionError) as error:
            return _refusal(f"request not understood: {error}")
        handler = self._commands.get(str(request.get("command")))
        if handler is None:
            return _refusal(f"unknown command; known: {', '.join(sorted(self._commands))}")
        try:
            return {"ok": True, **await handler(request)}
        except SteerError as error:
            return _refusal(str(error))

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        """A request. Where too many keep us waiting, the one that does longest is let go."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._silent) >= SILENT_MAX:
            longest = next(iter(self._silent))
            del self._silent[longest]
            longest.cancel()
        self._silent[task] = None
        try:
            return await asyncio.wait_for(reader.readuntil(b"\n"), TIMEOUT_S)
        finally:
            self._silent.pop(task, None)


def _refusal(text: str) -> Mapping[str, Any]:
    return {"ok": False, "error": text}


def _is_trusted(sock: socket.socket) -> bool:
    return rundir.peer(sock)[1] in (0, os.geteuid())
