"""The demo service: answers with the worker's slot and CPU, over HTTP/1.1 and UDP.

The main thread waits on the worker's sockets, and each connection has a thread, which may block.
Importing asyncio would take longer than the rest of a worker's start.
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
"""How long a stopping worker waits for the rest of a request, and for clients to read answers."""

_CHUNK_BYTES = 64 * 1024
_DATAGRAM_MAX_BYTES = 512
_ACCEPT_RETRY_S = 0.1
_DRAIN_MAX = 65_536


def serve(worker: Worker) -> None:
    """Answer on the worker's sockets until it is told to stop; then finish requests and return.

    TCP sockets speak HTTP/1.1. UDP sockets answer each datagram with one. `?sleep_ms=` delays an
    answer, and `?busy_ms=` keeps the whole process busy for that time. A stopping worker accepts
    the connections in its queues, closes its listeners, answers open requests with
    `Connection: close`, and closes idle connections.

    Args:
        worker: has the sockets and the slot, and handles signals.
    """
    wakeup, wakeup_in = socket.socketpair()
    with wakeup, wakeup_in:
        wakeup_in.setblocking(False)
        signal.set_wakeup_fd(wakeup_in.fileno(), warn_on_full_buffer=False)
        _Service(worker).run(wakeup)
        signal.set_wakeup_fd(-1)


def _ready(*fds: int, within_s: float | None = None, events: int = select.POLLIN) -> list[int]:
    """Wait until one of the descriptors is ready; return those that are."""
    if within_s is not None and within_s < 0:
        return []
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    return [fd for fd, _ in poll.poll(None if within_s is None else within_s * 1000)]


class _Service:
    """The sockets of one worker, and what its threads share.

    Attributes:
        computing: a lock that the request which computes holds, so that the others wait for it.
        stop_fd: becomes readable when the listeners are closed, and is never read.
        grace_end_s: when a stopping worker gives up incomplete requests. Set when `stop_fd` is.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.computing = threading.Lock()
        self.stop_fd = os.eventfd(0)
        self.grace_end_s = 0.0

    def run(self, wakeup: socket.socket) -> None:
        """Serve until the worker is stopping, then finish. A signal makes `wakeup` readable."""
        by_fd = {sock.fileno(): sock for sock in self.worker.sockets}
        for sock in self.worker.sockets:
            sock.setblocking(False)
        self.worker.ready()
        beat_s = self.worker.watchdog_s and self.worker.watchdog_s / 3
        while not self.worker.stopping:
            # Take only one connection from each socket in a turn. While this process computes,
            # the others wait in the queue, where the kernel can still move them to other workers.
            for fd in _ready(wakeup.fileno(), *by_fd, within_s=beat_s):
                if fd in by_fd:
                    self._take(by_fd[fd])
                else:
                    wakeup.recv(_CHUNK_BYTES)
            if beat_s:
                self.worker.beat()
        self._stop()

    def _stop(self) -> None:
        for sock in self.worker.sockets:
            for _ in range(_DRAIN_MAX):  # closing the listener would reset what is still queued
                if not self._take(sock):
                    break
            if sock.type == socket.SOCK_STREAM:
                sock.close()
        self.grace_end_s = time.monotonic() + GRACE_S
        os.eventfd_write(self.stop_fd, 1)
        # Wait only for delayed datagrams: until it is closed, the socket would get new ones.
        _join(threading.Timer)
        for sock in self.worker.sockets:
            sock.close()
        _join(threading.Thread)

    def _take(self, sock: socket.socket) -> bool:
        """Take one connection or datagram; return False if there was none."""
        return self._accept(sock) if sock.type == socket.SOCK_STREAM else self._receive(sock)

    def _accept(self, listener: socket.socket) -> bool:
        try:
            with self.computing:
                sock, _ = listener.accept()
        except BlockingIOError:
            return False
        except OSError:  # no free descriptor, or the controller is migrating the queue
            time.sleep(_ACCEPT_RETRY_S)
            return False
        _start(threading.Thread(target=_Connection(self, sock).serve))
        return True

    def _receive(self, sock: socket.socket) -> bool:
        # On a wildcard address the kernel chooses the source address of the answer by its route. If
        # the host has several addresses, it may be another than the client sent to.
        try:
            data, client = sock.recvfrom(_DATAGRAM_MAX_BYTES)
        except OSError:  # the queue is empty, or a pending error, which this call has cleared
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
        """Keep the CPU busy for a while, as a handler that computes does; return the answer."""
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
    """Wait for all threads of a class except this one. All threads of a demo worker are its own."""
    for thread in threading.enumerate():
        if isinstance(thread, kind) and thread is not threading.current_thread():
            thread.join()


class _Connection(io.RawIOBase):
    """The connection of one client, as a stream of what it sends. The stream ends when the client
    closes it or the worker stops waiting."""

    def __init__(self, service: _Service, sock: socket.socket) -> None:
        self._service = service
        self._slot = service.worker.slot
        self._sock = sock
        self._idle = False  # no request is open, so a stop need not wait for this client

    def serve(self) -> None:
        """Answer requests one by one until the client or the worker ends the connection."""
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
                self._lingering_close()

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
        """Answer a request after its delay; return whether another request may follow."""
        try:
            sleep_s, busy_s = demo_http.parse_delay(request.query)
        except ValueError as error:
            status, body = 400, demo_http.to_json({"error": str(error)})
        else:
            # Sleep, but wake up if the client resets the connection.
            _ready(self._sock.fileno(), within_s=sleep_s, events=0)
            status, body = 200, self._service.compute(busy_s)
        stopping = self._service.worker.stopping
        last = stopping or not request.keep_alive
        option = "close" if last else "" if request.modern else "keep-alive"
        with_body = request.method != b"HEAD"
        self._sock.sendall(demo_http.answer(status, self._slot, body, option, with_body=with_body))
        if stopping and request.keep_alive:
            self._lingering_close()
        return not last

    def _lingering_close(self) -> None:
        """Shut down the sending side, and read for a while before the connection is closed.

        Closing a socket with unread input sends a reset, which may overtake the answer (RFC 9112,
        9.6).
        """
        self._sock.shutdown(socket.SHUT_WR)
        end_s = time.monotonic() + GRACE_S
        fd = self._sock.fileno()
        while _ready(fd, within_s=end_s - time.monotonic()) and self._sock.recv(_CHUNK_BYTES):
            pass
