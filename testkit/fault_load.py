"""Steady clients, and the application they ask: each request is told from all others.

The application takes one connection at a time, so that queues form, and writes down whom it
answered before it does.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testkit.faults import Request
from testkit.programs import source

PORT = 8080
CLIENTS = 24
_PAUSE_S = 0.08
_TIMEOUT_S = 600.0
"""Longer than any test: who is not answered is found waiting."""

APP = source("writes_down")


class Record:
    """What workers wrote down.

    Args:
        home: directory the service runs in.
    """

    def __init__(self, home: Path) -> None:
        (home / "app.py").write_text(APP)
        self._path = home / "record"
        self._path.touch()
        self._path.chmod(0o666)

    def answered(self) -> Iterator[tuple[int, int]]:
        """Request and process id of each answer."""
        for pid, number in self._lines():
            if number != "ended":
                yield int(number), pid

    def ended(self) -> set[int]:
        """The workers that finished what they had."""
        return {pid for pid, number in self._lines() if number == "ended"}

    def _lines(self) -> Iterator[tuple[int, str]]:
        for line in self._path.read_text().splitlines():
            pid, what = line.split()
            yield int(pid), what


class Load:
    """Clients in threads, on all CPUs in turn; each asks again a little after it was answered.

    Attributes:
        requests: those that are over.
        waiting: when those under way began, by number, and their ports once connected.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.waiting: dict[int, tuple[float, int]] = {}
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on_and_on, args=(client,), daemon=True)
            for client in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def end(self, within_s: float) -> None:
        """No more requests; those under way are waited for."""
        self._ending.set()
        end_s = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    @property
    def made(self) -> int:
        """Connections."""
        return len(self.requests) + len(self.waiting)

    def _ask_on_and_on(self, client: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[client % len(cpus)]})
        number = client
        while not self._ending.wait(_PAUSE_S):
            self.requests.append(self._ask(number))
            del self.waiting[number]
            number += CLIENTS

    def _ask(self, number: int) -> Request:
        begun_s, port = time.monotonic(), 0
        self.waiting[number] = (begun_s, port)
        try:
            with socket.create_connection(("127.0.0.1", PORT), _TIMEOUT_S) as sock:
                port = sock.getsockname()[1]
                self.waiting[number] = (begun_s, port)
                sock.sendall(b"%d\n" % number)
                with sock.makefile("rb") as stream:
                    pid, echo = _understood(stream.read())
            error = "" if echo == number else f"the answer to {echo}"
        except (OSError, ValueError) as failure:
            pid, error = 0, repr(failure)
        return Request(number, port, begun_s, time.monotonic(), pid, error)


def _understood(answer: bytes) -> tuple[int, int]:
    """Raises ValueError: it is not whole."""
    if not answer.endswith(b"\n"):
        raise ValueError(f"answered {answer!r}")
    pid, number = answer.split()
    return int(pid), int(number)


@contextmanager
def load() -> Iterator[Load]:
    made = Load()
    try:
        yield made
    finally:
        made.end(0)
