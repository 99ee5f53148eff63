"""Requests in kept connections: as many a second, and as quick, under steer as without it?

Once a connection is accepted steer is out of its way, so nothing ought to differ; but the accepted
socket has the listener's options, and there a forgotten TCP_NODELAY made each request 40 ms
long. One worker each, so that who gets which connection does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from bench import peers, wrk
from bench.figures import Figure, Section, interleaved, ratio
from bench.peers import Peer, Running, Site, under_steer
from bench.servers import HOST, tool
from steer.errors import SteerError

CONCURRENCY = 16
AT_LEAST, P50_AT_MOST = 0.95, 1.05
ALONE = "alone"
BACKENDS = {"ebpf": "hash", "cbpf": "hash", "kernel": "kernel"}
"""And the policy on each, none of which pins the worker to a CPU."""
_PORT = 9900
_APP = "bench.apps:asgi"
_QUIET = ("--lifespan", "off", "--no-access-log", "--log-level", "warning", "--http", "httptools")


@dataclass(frozen=True)
class Subject:
    """A server.

    Args:
        under_steer: the end of a `steer run`.
        alone: the same by itself.
    """

    name: str
    under_steer: Sequence[str]
    alone: Callable[[Site], list[str]]


@dataclass(frozen=True)
class Seen:
    """Args: per_second: with CONCURRENCY at a time; the others with one."""

    per_second: float
    p50_us: float
    p99_us: float


def _uvicorn(loop: str) -> Subject:
    command = (tool("uvicorn"), *_QUIET, "--loop", loop, _APP)
    return Subject(
        f"uvicorn, {loop}",
        ("--", *command, "--fd", "{fd}"),
        lambda at: [*command, "--port", str(at.port)],
    )


def _hypercorn() -> Subject:
    command = (tool("hypercorn"), _APP)
    return Subject(
        "hypercorn",
        ("--", *command, "--bind", "fd://{fd}"),
        lambda at: [*command, "--bind", f"{HOST}:{at.port}"],
    )


def _gunicorn() -> Subject:
    command = (tool("gunicorn"), "-k", "asgi", "-w", "1", _APP)
    return Subject(
        "gunicorn, asgi",
        ("--", *command),
        lambda at: [*command, "-b", f"{HOST}:{at.port}"],
    )


def _callable() -> Subject:
    return Subject(
        "asyncio, a callable",
        ("bench.streams:serve",),
        lambda at: [tool("python"), "-m", "bench.streams", str(at.port)],
    )


def run(quick: bool) -> Iterator[Section]:
    all_of_them = (_callable, partial(_uvicorn, "asyncio"), partial(_uvicorn, "uvloop"))
    more = () if quick else (_hypercorn, _gunicorn)
    # Where the scheduler puts the client is half the result: rather often than long.
    rounds, for_s = (1, 0.2) if quick else (15, 0.2)
    for subject in (*all_of_them, *more):
        yield _section(subject(), rounds, for_s)


def _section(subject: Subject, rounds: int, for_s: float) -> Section:
    ours = [
        under_steer(name, 1, "--backend", name, "--policy", policy, *subject.under_steer)
        for name, policy in BACKENDS.items()
    ]
    failures: list[str] = []
    with ExitStack() as stack:
        alone = Peer(ALONE, subject.alone, None, None, lambda one: [one.server.pid])
        every = [*ours, alone]
        running = peers.all_running(every, _PORT, 1, stack, failures)
        subjects = {name: partial(_seen, one, for_s) for name, one in running.items()}
        found = interleaved(subjects, rounds)
    return Section(f"kept connections: {subject.name}", list(_figures(found)), failures)


def _figures(found: dict[str, tuple[Seen, ...]]) -> Iterator[Figure]:
    rates = {name: [each.per_second for each in seen] for name, seen in found.items()}
    halves = {name: [each.p50_us for each in seen] for name, seen in found.items()}
    for name in BACKENDS:
        if name in found and ALONE in found:
            what = f"{name} to {ALONE}"
            yield ratio(f"{what}, requests", rates[name], rates[ALONE], at_least=AT_LEAST)
            yield ratio(f"{what}, p50", halves[name], halves[ALONE], at_most=P50_AT_MOST)
    for name, seen in found.items():
        yield Figure(f"{name}, c={CONCURRENCY}", "/s", tuple(rates[name]))
        yield Figure(f"{name}, p50, c=1", "µs", tuple(halves[name]))
        yield Figure(f"{name}, p99, c=1", "µs", tuple(each.p99_us for each in seen))


def _seen(running: Running, for_s: float) -> Seen:
    """Raises SteerError: a request failed."""
    many, one = (_counts(running, at_a_time, for_s) for at_a_time in (CONCURRENCY, 1))
    return Seen(many.per_second, one.took_us[50], one.took_us[99])


def _counts(running: Running, concurrency: int, for_s: float) -> wrk.Counts:
    with wrk.asking(running.site.port, concurrency, kept=True) as client:
        time.sleep(for_s)
        counts = client.finish()
    if counts.errors or not counts.took_us:
        what = f"{counts.errors:,} of {counts.requests:,} requests failed"
        raise SteerError(f"ask {running.peer.name}", what)
    return counts
