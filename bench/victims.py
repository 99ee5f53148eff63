"""Workers that are stopped or killed, and which connections they had accepted by then.

What a worker has taken nobody can take back from it. So a worker is first stopped (SIGSTOP);
once all its threads are, its open sockets are looked through (pidfd_getfd(2)) for the clients'
ports. A request of our client on one of these ports, under way at that moment, was accepted by the
worker and is counted apart; one that still waited in an accept queue is in no process's files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.load import Request
from steer.errors import SteerError
from steer.linux import processes

_PIDFD_GETFD = 438
"""The system call's number, the same on every architecture but alpha."""
_PATIENCE_S = 5.0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Stop:
    """A worker that stands still, at one moment.

    Args:
        at_s: by CLOCK_MONOTONIC.
        ports: the clients' ends of what it had accepted.
    """

    at_s: float
    ports: frozenset[int]

    def holds(self, request: Request) -> bool:
        return request.port in self.ports and request.begun_s <= self.at_s <= request.ended_s


class Victim:
    """A worker, by pidfd, so that nobody else with its pid is ever hit."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    def stop(self, port: int) -> Stop:
        """Stop it, and see what it had accepted on the server's `port`.

        Raises:
            SteerError: it does not stand still.
            ProcessLookupError: it has ended.
        """
        self._send(signal.SIGSTOP)
        until_s = time.monotonic() + _PATIENCE_S
        while not _stands_still(self.pid):
            if time.monotonic() > until_s:
                raise SteerError(f"stop pid {self.pid}", f"still runs after {_PATIENCE_S:g} s")
            time.sleep(0.001)
        return Stop(time.monotonic(), frozenset(_accepted(self.pid, self._pidfd, port)))

    def go_on(self) -> None:
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)


@contextlib.contextmanager
def victim(pid: int) -> Iterator[Victim]:
    """Raises ProcessLookupError: it has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        yield Victim(pid, pidfd)
    finally:
        os.close(pidfd)


def apart(
    requests: Sequence[Request], stops: Sequence[Stop]
) -> tuple[list[Request], list[Request]]:
    """Those that no stopped worker had accepted, and those that one had."""
    by_port: dict[int, list[Stop]] = {}
    for stop in stops:
        for port in stop.ports:
            by_port.setdefault(port, []).append(stop)
    others: list[Request] = []
    accepted: list[Request] = []
    for request in requests:
        held = any(stop.holds(request) for stop in by_port.get(request.port, ()))
        (accepted if held else others).append(request)
    return others, accepted


def _stands_still(pid: int) -> bool:
    """Whether all its threads are stopped (proc_pid_stat(5)). Raises ProcessLookupError."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        stats = []
    states = {stat.rpartition(")")[2].split()[0] for stat in stats}
    if not states or states & {"Z", "X"}:
        raise ProcessLookupError(pid)
    return states == {"T"}


def _accepted(pid: int, pidfd: int, port: int) -> Iterator[int]:
    """Ports of the peers of its connections on `port`.

    A duplicate lives for a moment only: of a listener it would keep it open.
    """
    for number, _ in processes.sockets_by_fd(pid):
        fd = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        with socket.socket(fileno=fd) as sock, contextlib.suppress(OSError):
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] == port:
                yield sock.getpeername()[1]  # a listener has none
