"""Numbered datagrams: sent one a millisecond, and written down by the workers that get them."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import TYPE_CHECKING

from bench.servers import HOST

if TYPE_CHECKING:
    from steer.worker import Worker

FILE = "BENCH_DATAGRAMS_FILE"
"""The variable that names the workers' common file."""
_EVERY_S = 0.001
_FLOWS = 16
"""Sockets to send from: a hash that falls back would put one flow on one worker."""


def serve(worker: Worker) -> None:
    """For `steer run`: append each datagram to the file, a line each, until told to stop."""
    (sock,) = worker.sockets
    out = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    worker.ready()
    while True:
        try:
            data = sock.recv(64)
        except BlockingIOError:  # told to stop, and nothing left
            return
        os.write(out, data + b"\n")


def send(port: int, count: int) -> None:
    """From 0 on; one that is late does not make the next late."""
    senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(_FLOWS)]
    begun_s = time.monotonic()
    for number in range(count):
        time.sleep(max(begun_s + number * _EVERY_S - time.monotonic(), 0))
        senders[number % _FLOWS].sendto(b"%d" % number, (HOST, port))


if __name__ == "__main__":
    send(int(sys.argv[1]), int(sys.argv[2]))
