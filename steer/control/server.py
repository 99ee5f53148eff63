"""The control socket: a request and its answer, each a line of JSON.

Requests are `{"command": NAME, ...}`; answers `{"ok": true, ...}` or
`{"ok": false, "error": TEXT}`, with `"detail"` and `"exit_code"` where something was
tried and failed. With `"progress": true` in the request, lines
`{"progress": TEXT, "done": D, "of": N}` may come before the answer. With `"stay": true` the
connection stays open for another request, else it is closed. The server may close it even so
before it has read that request: the client then connects again. Only root and the user that runs
the service get an answer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from steer.control import protocol
from steer.control.protocol import (
    BACKLOG,
    CONNECTIONS_MAX,
    REQUEST_MAX_BYTES,
    SILENT_MAX,
    TIMEOUT_S,
    Request,
)
from steer.errors import Postponed, SteerError
from steer.linux.retry import AGAIN_S, Retry

_ACT = "answer at the control socket"
_PAUSE_S = 0.1
"""How long to wait between two requests of one connection."""
_TURNS = 8
"""asyncio takes some turns of its loop until it reads from a new connection."""
_LAST_S = 0.2
"""How long clients that have sent no request get at the end."""

Progress = Callable[[str, int, int], None]
"""Reports progress: words, how many are done, of how many (0: unknown). Never blocks."""
Handler = Callable[[Request, Progress], Awaitable[Mapping[str, Any]]]
"""Makes the answer to a request. An error that it raises as SteerError is an answer, too."""


class Server:
    """Answers on a listening socket.

    Args:
        sock: the listening socket; the caller closes it.
        commands: handlers by the name of the command. A handler runs to its end, whether or not the
            client waits for it.
        retry: accepts connections with spare descriptors.
    """

    def __init__(self, sock: socket.socket, commands: Mapping[str, Handler], retry: Retry) -> None:
        self._socket = sock
        self._commands = commands
        self._retry = retry
        self._is_open = True
        self._loop: asyncio.AbstractEventLoop
        self._conversations: set[asyncio.Task[Any]] = set()
        self._silent: dict[asyncio.Task[Any], None] = {}
        self._staying: dict[asyncio.Task[Any], None] = {}

    @property
    def has_clients(self) -> bool:
        """Whether anybody is connected."""
        return bool(self._conversations)

    async def __aenter__(self) -> Server:
        self._loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        # listen(2) again: it records this process as the peer that clients see (unix(7),
        # SO_PEERCRED).
        self._socket.listen(BACKLOG)
        self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Answer all clients first, those that have just connected, too."""
        while self._retry.result(_ACT, self._take, False):
            pass
        self._is_open = False
        self._loop.remove_reader(self._socket)
        for staying in self._staying:
            staying.cancel()
        for _turn in range(_TURNS):
            await asyncio.sleep(0)
        if self._silent:
            await asyncio.wait(self._silent, timeout=_LAST_S)
        for silent in self._silent:
            silent.cancel()
        if self._conversations:
            await asyncio.wait(self._conversations, timeout=TIMEOUT_S)
        for conversation in self._conversations:
            conversation.cancel()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Accept no connections in the block, so that another socket may replace the
        descriptor's."""
        self._loop.remove_reader(self._socket)
        try:
            yield
        finally:
            self._socket.setblocking(False)
            self._listen()

    def _listen(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._socket, self._on_connection)

    def _on_connection(self) -> None:
        if not self._retry.attempt(_ACT, self._take):
            # The socket stays readable: we would try again at once, and again for nothing.
            self._loop.remove_reader(self._socket)
            self._loop.call_later(AGAIN_S, self._listen)

    def _take(self) -> bool:
        """Accept a connection. Returns whether there was one. Raises OSError: as accept(2)."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        if len(self._conversations) >= CONNECTIONS_MAX and not self._make_room():
            with connection, suppress(OSError):
                connection.setblocking(False)
                connection.send(
                    _line(_refusal(f"more than {CONNECTIONS_MAX} requests are under way"))
                )
            return True
        task = self._loop.create_task(self._converse(connection))
        self._conversations.add(task)
        task.add_done_callback(self._conversations.discard)
        return True

    def _make_room(self) -> bool:
        """Close a connection that has its answer and was kept open. Returns whether there was
        one."""
        for staying in list(self._staying)[:1]:
            del self._staying[staying]
            return staying.cancel()
        return False

    async def _converse(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(
            sock=connection, limit=REQUEST_MAX_BYTES
        )
        # Else drain() would return while data is left in our own buffer.
        writer.transport.set_write_buffer_limits(0)
        try:
            stays = await self._exchange(reader, writer, self._request(reader))
            while stays:
                stays = await self._exchange(reader, writer, self._another(reader))
        except TimeoutError:
            writer.transport.abort()
        except (ConnectionError, _Left):
            pass  # the client has gone; its request is carried out even so
        finally:
            writer.close()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Awaitable[bytes]
    ) -> bool:
        """Read a request and answer it. Returns whether another one may follow."""
        request: Request = {}
        try:
            request = protocol.decode_request(await line, writer.get_extra_info("socket"))
        except asyncio.LimitOverrunError:
            answer = _refusal(protocol.TOO_LONG)
        except (asyncio.IncompleteReadError, TimeoutError):
            answer = _refusal(protocol.NOT_COMPLETE)
        except ValueError as error:
            answer = _refusal(str(error))
        else:
            answer = await self._answer(request, writer)
        writer.write(_line(answer))
        async with asyncio.timeout(TIMEOUT_S):
            await writer.drain()
        return self._is_open and request.get("stay") is True

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> Mapping[str, Any]:
        handler = self._commands.get(str(request.get("command")))
        if handler is None:
            return _refusal(f"unknown command; known: {', '.join(sorted(self._commands))}")
        try:
            return {"ok": True, **await handler(request, _progress_of(request, writer.transport))}
        except Postponed as error:
            return {**_refusal(str(error)), "again": True}
        except SteerError as error:
            return _refusal(str(error), detail=error.detail, exit_code=error.exit_code)
        except Exception as error:  # noqa: BLE001 - the client gets it as an answer, and the service goes on
            message = f"request {request.get('command')}"
            asyncio.get_running_loop().call_exception_handler(
                {"message": message, "exception": error}
            )
            return _refusal(f"bug in steer: {type(error).__name__}: {error}; see the service's log")

    async def _request(self, reader: asyncio.StreamReader) -> bytes:
        """Read a request. If too many clients have sent none, the one that waited longest is
        closed."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._silent) >= SILENT_MAX:
            longest = next(iter(self._silent))
            del self._silent[longest]
            longest.cancel()
        self._silent[task] = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await reader.readuntil(b"\n")
        finally:
            self._silent.pop(task, None)

    async def _another(self, reader: asyncio.StreamReader) -> bytes:
        """Read one more request of a client.

        Raises:
            _Left: the client has closed the connection, or sent nothing.
        """
        task = asyncio.current_task()
        assert task is not None
        self._staying[task] = None
        try:
            await asyncio.sleep(_PAUSE_S)
            return await self._request(reader)
        except (asyncio.IncompleteReadError, TimeoutError):
            raise _Left from None
        finally:
            self._staying.pop(task, None)


class _Left(Exception):
    """The client sends no more requests."""


def _progress_of(request: Request, transport: asyncio.WriteTransport) -> Progress:
    """The function that reports progress. It does nothing if the client did not request progress,
    and drops a report if the client has not read the one before."""

    def progress(text: str, done: int, of: int) -> None:
        if not transport.is_closing() and not transport.get_write_buffer_size():
            transport.write(_line({"progress": text, "done": done, "of": of}))

    return progress if request.get("progress") is True else lambda *_: None


def _line(message: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def _refusal(text: str, **more: Any) -> Mapping[str, Any]:
    # A path may contain bytes that are no UTF-8.
    return {"ok": False, "error": text.encode(errors="backslashreplace").decode(), **more}
