"""The plainest server that takes one request at a time: accept, keep for as long as the path says,
answer, close. For `steer run`, and by itself with one listener for all workers.

`python -m bench.blocking PORT WORKERS` is what steer's policies are held against: whoever is idle
takes the next connection from the one queue there is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from bench.servers import HOST

if TYPE_CHECKING:
    from steer.child.api import Worker

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n"
_BACKLOG = 2048


def serve(worker: Worker) -> None:
    """For `steer run`."""
    worker.ready()
    (listener,) = worker.sockets
    serve_on(listener)


def serve_on(listener: socket.socket) -> None:
    """Until it is told to stop, as `Worker` says."""
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:  # told to stop, and nothing left
            return
        with sock, contextlib.suppress(ConnectionError):
            _answer(sock, time.monotonic())


def _answer(sock: socket.socket, begun_s: float) -> None:
    _, _, path = sock.recv(4096).partition(b" /")
    until_s = begun_s + float(path.partition(b" ")[0] or 0)
    time.sleep(max(until_s - time.monotonic(), 0))
    sock.sendall(_ANSWER)


def main(port: int, workers: int) -> None:
    listener = socket.create_server((HOST, port), backlog=_BACKLOG)
    for _ in range(workers):
        if os.fork() == 0:
            serve_on(listener)
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
