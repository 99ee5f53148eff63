"""The demo service: says who answered and on which CPU, over HTTP/1.1 and UDP.

A thread for each connection, which may block as it likes; the main thread waits on the worker's
own sockets. asyncio would take longer to import than all the rest of a worker's start.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from steer.child import demo_http
from steer.linux.cpu import current_cpu

if TYPE_CHECKING:
    from steer.child.api import Worker

GRACE_S = 2.0
"""How long a stop waits for the rest of a request, and a last answer for its reader."""

_CHUNK_BYTES = 64 * 1024
_DATAGRAM_MAX_BYTES = 512
_ACCEPT_RETRY_S = 0.1
_DRAIN_MAX = 65_536


def serve(worker: Worker) -> None:
    """Answer on the worker's sockets until it is told to stop, finish what was begun and return.

    TCP sockets speak HTTP/1.1, UDP sockets one datagram for one. `?sleep_ms=` puts an answer off,
    `?busy_ms=` keeps the whole process busy for as long. At the stop the accept queues are
    emptied, the listeners closed, requests under way answered with `Connection: close`, and idle
    connections closed.

    Args:
        worker: its sockets, and what it is called; it handles the signals.
    """
    alarm, alarm_in = socket.socketpair()
    with alarm, alarm_in:
        alarm_in.setblocking(False)
        signal.set_wakeup_fd(alarm_in.fileno(), warn_on_full_buffer=False)
        _Service(worker).run(alarm)
        signal.set_wakeup_fd(-1)


def _ready(*fds: int, within_s: float | None = None, events: int = select.POLLIN) -> list[int]:
    """Which descriptors have something to say, as soon as one has."""
    if within_s is not None and within_s < 0:
        return []
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    return [fd for fd, _ in poll.poll(None if within_s is None else within_s * 1000)]


class _Service:
    """The sockets of one worker, and what its threads share.

    Attributes:
        computing: held by the one request that computes, so that all others wait for it.
        stop_fd: readable once the listeners are closed; never read.
        grace_end_s: when requests still incomplete are given up; means something once stopped.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.computing = threading.Lock()
        self.stop_fd = os.eventfd(0)
        self.grace_end_s = 0.0

    def run(self, alarm: socket.socket) -> None:
        """Serve until the worker is stopping, then finish; a signal makes `alarm` readable."""
        doors = {sock.fileno(): sock for sock in self.worker.sockets}
        for sock in self.worker.sockets:
            sock.setblocking(False)
        self.worker.ready()
        beat_s = self.worker.watchdog_s and self.worker.watchdog_s / 3
        while not self.worker.stopping:
            # One from each a turn: while this process computes, the others wait in the queue,
            # from which the kernel can still move them to another worker.
            for fd in _ready(alarm.fileno(), *doors, within_s=beat_s):
                if fd in doors:
                    self._take(doors[fd])
                else:
                    alarm.recv(_CHUNK_BYTES)
            if beat_s:
                self.worker.beat()
        self._stop()

    def _stop(self) -> None:
        for sock in self.worker.sockets:
            for _ in range(_DRAIN_MAX):  # what is queued, so that no reset meets it
                if not self._take(sock):
                    break
            if sock.type == socket.SOCK_STREAM:
                sock.close()
        self.grace_end_s = time.monotonic() + GRACE_S
        os.eventfd_write(self.stop_fd, 1)
        _join(threading.Timer)  # only: a socket that nobody reads would still get datagrams
        for sock in self.worker.sockets:
            sock.close()
        _join(threading.Thread)

    def _take(self, sock: socket.socket) -> bool:
        """Take one connection or datagram; False when there was none to take."""
        return self._accept(sock) if sock.type == socket.SOCK_STREAM else self._receive(sock)

    def _accept(self, listener: socket.socket) -> bool:
        try:
            with self.computing:
                sock, _ = listener.accept()
        except BlockingIOError:
            return False
        except OSError:  # out of descriptors, or shut down from outside and not yet back
            time.sleep(_ACCEPT_RETRY_S)
            return False
        _start(threading.Thread(target=_Connection(self, sock).serve))
        return True

    def _receive(self, sock: socket.socket) -> bool:
        # On a wildcard address of a host with several, the answer carries the address that the
        # route back prefers, which need not be the one that was asked.
        try:
            data, client = sock.recvfrom(_DATAGRAM_MAX_BYTES)
        except OSError:  # nothing left, or an error that reading it has cleared
            return False
        try:
            sleep_s, busy_s = demo_http.parse_delay(data.strip())
        except ValueError:
            sleep_s = busy_s = 0.0
        if sleep_s:
            _start(threading.Timer(sleep_s, self._reply, (sock, client, busy_s)))
        else:
            self._reply(sock, client, busy_s)
        return True

    def _reply(self, sock: socket.socket, client: Any, busy_s: float) -> None:
        datagram = self.compute(busy_s)
        with contextlib.suppress(OSError):  # a lost datagram: the client asks again
            sock.sendto(datagram, client)

    def compute(self, busy_s: float) -> bytes:
        """Hold the CPU for a while, as a handler that computes does, then say who did."""
        with self.computing:
            end_s = time.monotonic() + busy_s
            while time.monotonic() < end_s:
                pass
            about = {
                "slot": self.worker.slot,
                "pid": os.getpid(),
                "cpu": current_cpu(),
                "generation": self.worker.generation,
                "name": self.worker.name,
            }
        return demo_http.to_json(about)


def _start(thread: threading.Thread) -> None:
    thread.daemon = True
    with contextlib.suppress(RuntimeError):  # no more threads: the client is dropped
        thread.start()


def _join(kind: type[threading.Thread]) -> None:
    """Wait for all threads of a kind but this one: in a worker all are the demo's."""
    for thread in threading.enumerate():
        if isinstance(thread, kind) and thread is not threading.current_thread():
            thread.join()


class _Connection(io.RawIOBase):
    """One client; as a stream, what it sends up to its end or that of our patience."""

    def __init__(self, service: _Service, sock: socket.socket) -> None:
        self._service = service
        self._slot = service.worker.slot
        self._sock = sock
        self._idle = False  # all that was asked is answered: a stop need not wait for more

    def serve(self) -> None:
        """Answer requests, one at a time and in order, until either side has had enough."""
        stream = io.BufferedReader(self)
        with self._sock, contextlib.suppress(OSError):  # the client is gone
            try:
                while (request := demo_http.read_request(stream)) and self._answer(request):
                    self._idle = True
                    if not stream.peek():
                        return
                    self._idle = False
            except demo_http.Refused as refused:
                body = demo_http.to_json({"error": str(refused)})
                self._sock.sendall(demo_http.answer(refused.status, self._slot, body, "close"))
                self._linger()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        fd = self._sock.fileno()
        if fd not in _ready(fd, self._service.stop_fd):
            grace_s = self._service.grace_end_s - time.monotonic()
            if self._idle or not _ready(fd, within_s=grace_s):
                return 0
        return self._sock.recv_into(buffer)

    def _answer(self, request: demo_http.Request) -> bool:
        """Answer when it is time. Returns whether another request may come."""
        try:
            sleep_s, busy_s = demo_http.parse_delay(request.query)
        except ValueError as error:
            status, body = 400, demo_http.to_json({"error": str(error)})
        else:
            _ready(self._sock.fileno(), within_s=sleep_s, events=0)  # a sleep that a reset ends
            status, body = 200, self._service.compute(busy_s)
        stopping = self._service.worker.stopping
        last = stopping or not request.keep_alive
        option = "close" if last else "" if request.modern else "keep-alive"
        with_body = request.method != b"HEAD"
        self._sock.sendall(demo_http.answer(status, self._slot, body, option, with_body=with_body))
        if stopping and request.keep_alive:
            self._linger()
        return not last

    def _linger(self) -> None:
        """Say no more but read on for a while.

        Closing with input unread sends a reset, which may overtake the answer (RFC 9112, 9.6).
        """
        self._sock.shutdown(socket.SHUT_WR)
        end_s = time.monotonic() + GRACE_S
        fd = self._sock.fileno()
        while _ready(fd, within_s=end_s - time.monotonic()) and self._sock.recv(_CHUNK_BYTES):
            pass
