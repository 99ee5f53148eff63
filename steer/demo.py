"""The demo service: says who answered and on which CPU, over HTTP/1.1 and UDP.

One asyncio loop. A request is answered at once, or after the delay it asks for. The parser takes
what RFC 9112 lets a client send, bare line feeds included so that a hand with `nc` is understood,
and refuses the rest. Every path has the same answer, so there is nothing to route.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import msgspec

from steer.kernel.cpu import current_cpu

if TYPE_CHECKING:
    from steer.worker import Worker

GRACE_S = 2.0
"""How long a stop waits for the rest of a request, and a last answer for its reader."""

_HEAD_MAX_BYTES = 64 * 1024
_DATAGRAM_MAX_BYTES = 512
_DATAGRAMS_PER_TURN = 16
_DELAY_MAX_MS = 3_600_000
_ACCEPT_RETRY_S = 0.1
_DRAIN_MAX = 65_536

_LINE_END = re.compile(rb"\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~\w]+) ([^\x00-\x20\x7f]+) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~\w]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_MILLISECONDS = re.compile(rb"[0-9]{1,7}")

_REASONS = {
    200: b"OK",
    400: b"Bad Request",
    411: b"Length Required",
    431: b"Request Header Fields Too Large",
}
_encode = json.JSONEncoder(separators=(",", ":")).encode


def serve(worker: Worker) -> None:
    """Answer on the worker's sockets until SIGTERM, then finish what was begun and return.

    TCP sockets speak HTTP/1.1, UDP sockets one datagram for one. `?sleep_ms=` puts an answer off,
    `?busy_ms=` keeps the whole process busy for as long. On SIGTERM the accept queues are emptied,
    the listeners closed, requests under way answered with `Connection: close`, and idle
    connections closed. SIGINT is left to the controller.

    Args:
        worker: its sockets, and what it is called.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_Service(worker).run())


class _Refused(Exception):
    """A request that cannot be read, hence nor can what follows it."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        self.why = why
        super().__init__(why)


class _Request(msgspec.Struct, frozen=True):
    method: bytes
    query: bytes
    keep_alive: bool
    says_keep_alive: bool
    body_bytes: int
    wants_continue: bool


class _Delay(msgspec.Struct, frozen=True):
    sleep_s: float = 0.0
    busy_s: float = 0.0


def _parse_request(head: bytes) -> _Request:
    """Read a request's head (RFC 9112, sections 3 to 6). Raises _Refused."""
    first, *rest = _LINE_END.split(head)
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise _Refused(400, "malformed request line")
    fields = _parse_fields(rest)
    if b"transfer-encoding" in fields:
        raise _Refused(411, "a body needs Content-Length here")
    length = fields.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        raise _Refused(400, "malformed Content-Length")
    options = {option.strip() for option in fields.get(b"connection", b"").lower().split(b",")}
    modern = line[3] == b"1"
    keep_alive = b"close" not in options and (modern or b"keep-alive" in options)
    return _Request(
        method=line[1],
        query=line[2].partition(b"?")[2],
        keep_alive=keep_alive,
        says_keep_alive=keep_alive and not modern,
        body_bytes=int(length),
        wants_continue=modern and fields.get(b"expect", b"").lower() == b"100-continue",
    )


def _parse_fields(lines: list[bytes]) -> dict[bytes, bytes]:
    """Header fields by lower-case name; repeated ones joined by a comma (RFC 9110, 5.3)."""
    fields: dict[bytes, bytes] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise _Refused(400, "malformed header field")
        name, value = field[1].lower(), field[2].strip()
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def _parse_delay(query: bytes) -> _Delay:
    """The delay that a query asks for. Raises ValueError when it is no number of milliseconds."""
    wanted_ms = {b"sleep_ms": 0, b"busy_ms": 0}
    for pair in query.split(b"&"):
        name, _, value = pair.partition(b"=")
        if name in wanted_ms:
            wanted_ms[name] = int(value) if _MILLISECONDS.fullmatch(value) else -1
            if not 0 <= wanted_ms[name] <= _DELAY_MAX_MS:
                raise ValueError(f"{name.decode()} must be a whole number, 0 to {_DELAY_MAX_MS}")
    return _Delay(wanted_ms[b"sleep_ms"] / 1000, wanted_ms[b"busy_ms"] / 1000)


def _spin(busy_s: float) -> None:
    """Hold the CPU: what a handler that computes does to everyone else in its process."""
    end_s = time.monotonic() + busy_s
    while time.monotonic() < end_s:
        pass


class _Service:
    """All sockets of one worker, and the connections that came by them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.connections: set[_Connection] = set()
        self.stopping = False
        self.changed = asyncio.Event()
        self._adopting: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        doors = [
            (_Listener if sock.type == socket.SOCK_STREAM else _Datagrams)(self, sock)
            for sock in self.worker.sockets
        ]
        self.worker.ready()
        if not self.worker.stopping:  # a SIGTERM from before our handler was there
            await stop.wait()
        await self._stop(doors)

    def adopt(self, sock: socket.socket) -> None:
        """Serve a connection just accepted."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(partial(_Connection, self), sock))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    def about(self) -> dict[str, object]:
        """What every answer says."""
        return {
            "slot": self.worker.slot,
            "pid": os.getpid(),
            "cpu": current_cpu(),
            "generation": self.worker.generation,
            "name": self.worker.name,
        }

    async def _stop(self, doors: list[_Listener | _Datagrams]) -> None:
        self.stopping = True
        for door in doors:
            door.stop()
        await asyncio.gather(*self._adopting, return_exceptions=True)
        for connection in list(self.connections):
            connection.retire()
        while self.connections or not all(door.closed for door in doors):
            self.changed.clear()
            await self.changed.wait()


class _Listener:
    """One TCP listener."""

    def __init__(self, service: _Service, sock: socket.socket) -> None:
        self._service = service
        self._sock = sock
        sock.setblocking(False)
        self._watch()

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def stop(self) -> None:
        """Take what is queued, so that no reset meets it, then close."""
        for _ in range(_DRAIN_MAX):
            if not self._accept():
                break
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def _watch(self) -> None:
        # One a turn: while this process is busy, the others wait in the queue, from which the
        # kernel can still move them to another worker. asyncio's server takes a hundred, and
        # would shorten the backlog to as many.
        if not self.closed:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _accept(self) -> bool:
        """Take one connection; False when there was none to take."""
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return False
        except ConnectionAbortedError:
            return True
        except OSError:  # out of descriptors, or shut down from outside and not yet back
            asyncio.get_running_loop().remove_reader(self._sock)
            asyncio.get_running_loop().call_later(_ACCEPT_RETRY_S, self._watch)
            return False
        self._service.adopt(sock)
        return True


class _Datagrams:
    """One UDP socket: for each datagram one answer, from the socket it came in by.

    On a socket bound to a wildcard address of a host with several, the answer carries the address
    that the route back prefers, which need not be the one that was asked.
    """

    def __init__(self, service: _Service, sock: socket.socket) -> None:
        self._service = service
        self._sock = sock
        self._delayed = 0
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._receive_some, _DATAGRAMS_PER_TURN)

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def stop(self) -> None:
        """Answer what is queued, and close unless answers are still owed."""
        self._receive_some(_DRAIN_MAX)
        if self._delayed == 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._service.changed.set()

    def _receive_some(self, most: int) -> None:
        for _ in range(most):
            try:
                data, client = self._sock.recvfrom(_DATAGRAM_MAX_BYTES)
            except OSError:  # nothing left, or an error that reading it has cleared
                return
            self._receive(data, client)

    def _receive(self, data: bytes, client: Any) -> None:
        try:
            delay = _parse_delay(data.strip())
        except ValueError:
            delay = _Delay()
        if delay.sleep_s:
            self._delayed += 1
            loop = asyncio.get_running_loop()
            loop.call_later(delay.sleep_s, self._answer_delayed, client, delay.busy_s)
        else:
            self._answer(client, delay.busy_s)

    def _answer(self, client: Any, busy_s: float) -> None:
        _spin(busy_s)
        with contextlib.suppress(OSError):  # a lost datagram: the client asks again
            self._sock.sendto(_encode(self._service.about()).encode() + b"\n", client)

    def _answer_delayed(self, client: Any, busy_s: float) -> None:
        self._answer(client, busy_s)
        self._delayed -= 1
        if self._service.stopping and self._delayed == 0:
            self.stop()


class _Connection(asyncio.Protocol):
    """One client: its requests are read and answered one at a time, in order."""

    def __init__(self, service: _Service) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._transport = cast(asyncio.Transport, None)
        self._buffer = bytearray()
        self._searched_bytes = 0  # of the buffer, known to hold no end of a head
        self._request: _Request | None = None  # its head is read, its answer not given
        self._body_left_bytes = 0
        self._sleeping: asyncio.TimerHandle | None = None
        self._blocked = False  # the client does not read its answers
        self._ended = False  # the client sends no more
        self._lingering = False  # we send no more
        self._served = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._service.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sleeping:
            self._sleeping.cancel()
        self._service.connections.discard(self)
        self._service.changed.set()

    def data_received(self, data: bytes) -> None:
        if not self._lingering:
            self._buffer += data
            self._advance()

    def eof_received(self) -> bool:
        self._ended = True
        return self._held

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._advance()

    def retire(self) -> None:
        """Close if idle; a request half sent, or a first one, is given time to arrive."""
        idle = self._served and not self._buffer and not self._request
        # Never at once: what this turn of the loop has yet to read is then still answered.
        self._loop.call_later(0 if idle else GRACE_S, self._give_up)

    def _give_up(self) -> None:
        if not (self._sleeping or self._lingering):
            self._transport.close()

    @property
    def _held(self) -> bool:
        """Whether requests wait here although they may be complete."""
        return self._sleeping is not None or self._blocked

    def _advance(self) -> None:
        try:
            while not (self._held or self._transport.is_closing()):
                request = self._next_request()
                if request is None:
                    break
                self._begin(request)
        except _Refused as refused:
            self._refuse(refused)
        if self._ended and not self._held:
            self._transport.close()
        elif self._held and len(self._buffer) > _HEAD_MAX_BYTES:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _next_request(self) -> _Request | None:
        """The next request, once its head is read and its body skipped."""
        if self._request is None:
            head = self._take_head()
            if head is None:
                return None
            self._request = _parse_request(head)
            self._body_left_bytes = self._request.body_bytes
            if self._request.wants_continue:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        skipped_bytes = min(self._body_left_bytes, len(self._buffer))
        del self._buffer[:skipped_bytes]
        self._body_left_bytes -= skipped_bytes
        return None if self._body_left_bytes else self._request

    def _take_head(self) -> bytes | None:
        if self._buffer.startswith((b"\r", b"\n")):  # RFC 9112, 2.2: empty lines before a request
            self._buffer = self._buffer.lstrip(b"\r\n")
        end = _HEAD_END.search(self._buffer, self._searched_bytes)
        if (end.start() if end else len(self._buffer)) > _HEAD_MAX_BYTES:
            raise _Refused(431, f"a request's head has at most {_HEAD_MAX_BYTES} bytes")
        if end is None:
            self._searched_bytes = max(0, len(self._buffer) - len(b"\r\n\r"))
            return None
        head = bytes(self._buffer[: end.start()])
        del self._buffer[: end.end()]
        self._searched_bytes = 0
        return head

    def _begin(self, request: _Request) -> None:
        try:
            delay = _parse_delay(request.query)
        except ValueError as error:
            self._respond(request, 400, {"error": str(error)})
            return
        if delay.sleep_s:
            self._sleeping = self._loop.call_later(delay.sleep_s, self._wake, request, delay.busy_s)
        else:
            self._answer(request, delay.busy_s)

    def _wake(self, request: _Request, busy_s: float) -> None:
        self._sleeping = None
        self._answer(request, busy_s)
        self._advance()

    def _answer(self, request: _Request, busy_s: float) -> None:
        _spin(busy_s)
        self._respond(request, 200, self._service.about())

    def _respond(self, request: _Request, status: int, content: dict[str, object]) -> None:
        self._request = None
        self._served = True
        last = self._service.stopping or not request.keep_alive
        option = b"close" if last else b"keep-alive" if request.says_keep_alive else b""
        self._write(status, content, option, with_body=request.method != b"HEAD")
        if not request.keep_alive:
            self._transport.close()
        elif last:
            self._linger()

    def _refuse(self, refused: _Refused) -> None:
        self._write(refused.status, {"error": refused.why}, b"close", with_body=True)
        self._linger()

    def _write(
        self, status: int, content: dict[str, object], option: bytes, *, with_body: bool
    ) -> None:
        body = _encode(content).encode() + b"\n"
        slot = self._service.worker.slot
        head = (
            b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            b"X-Steer-Slot: %d\r\n" % (status, _REASONS[status], len(body), slot)
        )
        connection = b"Connection: %b\r\n" % option if option else b""
        self._transport.write(head + connection + b"\r\n" + (body if with_body else b""))

    def _linger(self) -> None:
        """Say no more but read on for a while.

        Closing with input unread sends a reset, which may overtake the answer (RFC 9112, 9.6).
        """
        self._lingering = True
        self._buffer.clear()
        self._transport.write_eof()
        self._loop.call_later(GRACE_S, self._transport.abort)
