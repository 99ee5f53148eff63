"""A client that keeps the outcome, the time and the local port of every request it made.

A process of its own with one thread and one epoll, and a connection for each request. Closed
loop: so many at once, another whenever one has ended. Open loop: so many a second, whatever
becomes of them, and each one's time counts from when it was due, so that what a stall holds up is
counted even if the client itself was held up by it. When they are due, and how long each answer is
to take, is drawn beforehand: with one seed every server is asked the very same.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import random
import resource
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from bench.servers import HOST, ROOT
from steer.errors import SteerError

OK, REFUSED, RESET, CLOSED, TIMEOUT, BAD = "ok", "refused", "reset", "closed", "timeout", "bad"
_HEAD = "Host: bench\r\nConnection: close\r\nAccept-Encoding: gzip\r\n"
_REQUEST = f"GET /{{}} HTTP/1.1\r\n{_HEAD}\r\n"
_CHUNK_BYTES = 65536
_AFTER_REFUSAL_S = 0.01
"""For so long a closed loop holds back: with nobody there it would only count its own speed."""
_PATIENCE_S = 60.0


class Plan(msgspec.Struct, frozen=True):
    """What to ask of a server on loopback. It goes on until told to finish.

    Args:
        concurrency: closed loop, with so many at once.
        rate: open loop, with so many a second.
        seed: of the chance that spaces an open loop (Poisson); None: evenly.
        at_least: requests; if told to finish before, it does them first.
        at_most: requests, of an open loop; 0: no limit.
        mix: of an open loop's answers, shares and for how many seconds each of these keeps a
            worker, which the path asks for; none: "/" is asked for.
        roams: each request is made from a CPU taken by chance, as a network card's receive
            queues spread connections; else from where the scheduler puts us.
        timeout_s: a request that takes longer from connect() on has failed.
    """

    port: int
    concurrency: int = 0
    rate: float = 0.0
    seed: int | None = None
    at_least: int = 0
    at_most: int = 0
    mix: tuple[tuple[float, float], ...] = ()
    roams: bool = False
    timeout_s: float = 10.0


class Due(NamedTuple):
    """A request of an open loop.

    Args:
        at_s: after the first.
        takes_s: the worker is to be kept for so long.
        place: where to ask from, from 0 to 1.
    """

    at_s: float
    takes_s: float
    place: float


def schedule(plan: Plan) -> Iterator[Due]:
    """All requests of an open loop; with the same seed always the same. Pure."""
    chance = random.Random(plan.seed)
    shares, times_s = zip(*(plan.mix or ((1.0, 0.0),)), strict=True)
    at_s = 0.0
    for _ in range(plan.at_most) if plan.at_most else itertools.count():
        yield Due(at_s, chance.choices(times_s, shares)[0], chance.random())
        at_s += 1 / plan.rate if plan.seed is None else chance.expovariate(plan.rate)


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One that has ended.

    Args:
        begun_s: when it was due (open loop) or connect() was called, by CLOCK_MONOTONIC.
        took_s: until the last byte of the answer, or until it failed.
        outcome: "ok"; "refused"; "reset"; "closed" before a whole answer; "timeout";
            "bad", an answer that is not 200.
        port: of our end.
        body: of a whole answer, as far as it came at once.
    """

    begun_s: float
    took_s: float
    outcome: str
    port: int
    body: str = ""

    @property
    def ended_s(self) -> float:
        return self.begun_s + self.took_s


class Load:
    """A client that was started a moment ago."""

    def __init__(self, plan: Plan) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.load", msgspec.json.encode(plan).decode()],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._plan = plan

    def finish(self) -> list[Request]:
        """Begin no more, or no more than `at_most`; what became of all of them.

        Raises:
            SteerError: the client failed, which says nothing of the server.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, words = self._process.communicate(timeout=self._longest_s())
            if self._process.returncode == 0:
                return msgspec.json.decode(output, type=list[Request])
            raise SteerError("ask a server", "the client failed", detail=words.decode())
        raise SteerError("ask a server", f"the client does not end in {self._longest_s():g} s")

    def _longest_s(self) -> float:
        plan = self._plan
        return plan.timeout_s + _PATIENCE_S + (plan.at_most / plan.rate if plan.at_most else 0)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Also when it is gone already."""
        self._process.kill()
        with self._process:
            pass


@contextlib.contextmanager
def load(plan: Plan) -> Iterator[Load]:
    """Ask until `finish()`, or at the latest until the end of the block."""
    started = Load(plan)
    try:
        yield started
    finally:
        started.kill()


# ---- the client's own process


class _Connection:
    """A request under way.

    Args:
        late_s: when it has failed.
    """

    __slots__ = (
        *("answered_s", "begun_s", "data", "late_s", "open"),
        *("port", "request", "sent", "sock"),
    )

    def __init__(self, sock: socket.socket, request: bytes, begun_s: float, late_s: float) -> None:
        self.sock, self.request = sock, request
        self.begun_s, self.late_s = begun_s, late_s
        self.port = sock.getsockname()[1]
        self.data = b""
        self.answered_s = 0.0
        self.sent = False
        self.open = True


class _Client:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._address = (HOST, plan.port)
        self._cpus = sorted(os.sched_getaffinity(0))
        self._schedule = schedule(plan)
        self._due = None if plan.concurrency else next(self._schedule, None)
        self._epoll = select.epoll()
        self._epoll.register(sys.stdin.fileno())
        self._open: dict[int, _Connection] = {}
        self._in_order: deque[_Connection] = deque()
        self._started_s = self._next_s = time.monotonic()
        self._told = False
        self.done: list[Request] = []

    def run(self) -> None:
        while (begins := self._begins()) or self._open:
            if begins:
                self._begin_due()
            self._wait(begins)
            for fd, _ in self._epoll.poll(0):
                self._handle(fd)
            self._give_up()

    def _begins(self) -> bool:
        if self._plan.at_most:
            return self._due is not None
        return not self._told or len(self.done) < self._plan.at_least

    def _begin_due(self) -> None:
        now_s = time.monotonic()
        if self._plan.concurrency:
            for _ in range(self._plan.concurrency - len(self._open)):
                if now_s >= self._next_s:
                    self._begin(time.monotonic())
            return
        while self._due and self._next_s <= now_s:
            if self._plan.roams:
                os.sched_setaffinity(0, {self._cpus[int(self._due.place * len(self._cpus))]})
            self._begin(self._next_s, self._due.takes_s)
            self._due = next(self._schedule, None)
            self._next_s = self._started_s + self._due.at_s if self._due else 0.0

    def _wait(self, begins: bool) -> None:
        """Until something happens or is due. Not by epoll or poll: they count in milliseconds."""
        until_s = [self._in_order[0].late_s] if self._in_order else []
        if begins and (self._plan.rate or len(self._open) < self._plan.concurrency):
            until_s.append(self._next_s)
        wait_s = max(min(until_s) - time.monotonic(), 0) if until_s else None
        select.select([self._epoll], [], [], wait_s)  # noqa: TID251 - of few descriptors

    def _begin(self, begun_s: float, takes_s: float = 0.0) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        error = sock.connect_ex(self._address)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, "connect")
        request = _REQUEST.format(takes_s or "").encode()
        late_s = time.monotonic() + self._plan.timeout_s
        connection = _Connection(sock, request, begun_s, late_s)
        self._open[sock.fileno()] = connection
        self._in_order.append(connection)
        self._epoll.register(sock, select.EPOLLOUT)
        self._go_on(connection)

    def _handle(self, fd: int) -> None:
        if fd in self._open:
            self._go_on(self._open[fd])
        elif fd == sys.stdin.fileno():
            self._told = True
            self._epoll.unregister(fd)

    def _go_on(self, connection: _Connection) -> None:
        try:
            if connection.sent:
                self._receive(connection)
            else:
                connection.sock.send(connection.request)
                connection.sent = True
                self._epoll.modify(connection.sock, select.EPOLLIN)
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            if self._plan.concurrency:
                self._next_s = time.monotonic() + _AFTER_REFUSAL_S
            self._end(connection, REFUSED)
        except (ConnectionError, TimeoutError):
            self._end(connection, RESET)

    def _receive(self, connection: _Connection) -> None:
        data = connection.sock.recv(_CHUNK_BYTES)
        if not data:
            self._end(connection, CLOSED)
            return
        connection.data += data
        if not connection.answered_s and _is_whole(connection.data):
            connection.answered_s = time.monotonic()

    def _give_up(self) -> None:
        now_s = time.monotonic()
        while self._in_order and not (self._in_order[0].open and self._in_order[0].late_s > now_s):
            connection = self._in_order.popleft()
            if connection.open:
                self._end(connection, TIMEOUT)

    def _end(self, connection: _Connection, failure: str) -> None:
        """It failed, unless the whole answer had come before that."""
        outcome = failure
        if connection.answered_s:
            outcome = OK if connection.data.startswith(b"HTTP/1.1 200 ") else BAD
        took_s = (connection.answered_s or time.monotonic()) - connection.begun_s
        body = connection.data.partition(b"\r\n\r\n")[2].decode(errors="replace")
        self.done.append(Request(connection.begun_s, took_s, outcome, connection.port, body))
        del self._open[connection.sock.fileno()]
        connection.sock.close()
        connection.open = False


def _is_whole(data: bytes) -> bool:
    """Whether it is an answer with as long a body as it says (RFC 9112, 6.3), or in chunks."""
    head, end, body = data.partition(b"\r\n\r\n")
    fields = head.lower()
    if b"\r\ntransfer-encoding: chunked" in fields:
        return body.endswith(b"0\r\n\r\n")
    _, _, rest = fields.partition(b"\r\ncontent-length:")
    return bool(end and rest) and len(body) >= int(rest.partition(b"\r\n")[0])


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.disable()  # no pauses of our own
    client = _Client(plan)
    client.run()
    sys.stdout.buffer.write(msgspec.json.encode(client.done))


if __name__ == "__main__":
    main()
