"""Numbered datagrams: sent at a pace, and written down by the workers that get them."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import blocking
from bench.servers import HOST

if TYPE_CHECKING:
    from steer.child.api import Worker

FILE = "BENCH_DATAGRAMS_FILE"
"""The variable that names the workers' common file."""
_EVERY_S = 0.001
_FLOWS = 16
"""Sockets to send from: a hash that falls back would put one flow on one worker."""
_UNDER_WAY_MAX = 100
"""Of a flood: fewer than the least receive buffer holds, so none is lost there."""
_AT_ONCE = 10
_LINE = b"%08d"


def serve(worker: Worker) -> None:
    """For `steer run`: append each datagram to the file, a line each, until told to stop."""
    (udp,) = worker.sockets
    worker.ready()
    _write_down(udp)


def serve_both(worker: Worker) -> None:
    """The same with the second socket, and with the first, of TCP, what `blocking` does."""
    tcp, udp = worker.sockets
    threading.Thread(target=blocking.serve_on, args=(tcp,), daemon=True).start()
    worker.ready()
    _write_down(udp)


def _write_down(sock: socket.socket) -> None:
    out = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        try:
            data = sock.recv(64)
        except BlockingIOError:  # told to stop, and nothing left
            return
        os.write(out, data + b"\n")


def send(port: int, count: int) -> None:
    """From 0 on, one a millisecond; one that is late does not make the next late."""
    senders = _senders()
    begun_s = time.monotonic()
    for number in range(count):
        time.sleep(max(begun_s + number * _EVERY_S - time.monotonic(), 0))
        senders[number % _FLOWS].sendto(_LINE % number, (HOST, port))


def flood(port: int, file: Path) -> None:
    """As fast as the workers take them, but no faster, until standard input ends; write how many.

    Args:
        file: the workers'; as long as what they have received.
    """
    senders = _senders()
    told = threading.Thread(target=sys.stdin.read)
    told.start()
    number = 0
    while told.is_alive():
        under_way = number - received(file)
        for _ in range(min(_AT_ONCE, _UNDER_WAY_MAX - under_way)):
            senders[number % _FLOWS].sendto(_LINE % number, (HOST, port))
            number += 1
        time.sleep(_EVERY_S)
    print(number)


def received(file: Path) -> int:
    """How many the workers have written down."""
    return file.stat().st_size // len(_LINE % 0 + b"\n")


def _senders() -> list[socket.socket]:
    return [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(_FLOWS)]


if __name__ == "__main__":
    if sys.argv[2].isdecimal():
        send(int(sys.argv[1]), int(sys.argv[2]))
    else:
        flood(int(sys.argv[1]), Path(sys.argv[2]))
