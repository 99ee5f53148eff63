"""wrk, a client that others wrote: started, and what it says it found."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bench import servers
from bench.servers import HOST
from steer.errors import SteerError

_TIMEOUT_S = 10
_TOOK = re.compile(r"^ +(\d+)% +([\d.]+)(us|ms|s) *$", re.MULTILINE)
_US = {"us": 1.0, "ms": 1e3, "s": 1e6}
_PATIENCE_S = 20.0
_LONG = "1h"
"""It is told to end before."""


@dataclass(frozen=True)
class Counts:
    """Args: errors: of connections, and answers that are neither 2xx nor 3xx.

    took_us: how long a request took, by percentile, where that was asked for.
    """

    requests: int
    errors: int
    per_second: float = 0.0
    took_us: Mapping[int, float] = field(default_factory=dict)


class Wrk:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def finish(self) -> Counts:
        """Tell it to end. Raises SteerError: it does not, or says nothing that we know."""
        self._process.send_signal(signal.SIGINT)
        try:
            words, _ = self._process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise SteerError("run wrk", f"does not end in {_PATIENCE_S:g} s") from None
        return counts(words)


@contextlib.contextmanager
def asking(port: int, concurrency: int, kept: bool = False) -> Iterator[Wrk]:
    """Ask a server on loopback until `finish()`.

    Args:
        kept: in as many connections as there are requests at a time, else in one for each
            request.

    Raises:
        SteerError: wrk is not installed.
    """
    options = ["-t", "1", "-c", str(concurrency), "-d", _LONG, "--timeout", f"{_TIMEOUT_S}s"]
    more = ["--latency"] if kept else ["-H", "Connection: close"]
    command = [servers.system_tool("wrk"), *options, *more, f"http://{HOST}:{port}/"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Wrk(process)
        finally:
            process.kill()


def counts(words: str) -> Counts:
    """From what it prints; of what never happened it has no line.

    Raises:
        SteerError: it does not say how many requests there were.
    """
    requests = re.search(r"^ *(\d+) requests in", words, re.MULTILINE)
    if not requests:
        raise SteerError("read what wrk says", "no number of requests", detail=words)
    sockets = re.search(r"Socket errors: (.*)", words)
    answers = re.search(r"Non-2xx or 3xx responses: (\d+)", words)
    errors = sum(map(int, re.findall(r"\d+", sockets[1]))) if sockets else 0
    rate = re.search(r"^Requests/sec: +([\d.]+)", words, re.MULTILINE)
    return Counts(
        int(requests[1]),
        errors + (int(answers[1]) if answers else 0),
        float(rate[1]) if rate else 0.0,
        {int(percent): float(took) * _US[unit] for percent, took, unit in _TOOK.findall(words)},
    )
