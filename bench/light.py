"""Who gets the connections while hardly anything is going on: how evenly, and how many are given
to a worker that has just been stopped.

Each answer holds the process id of who gave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import msgspec

from bench import load, outcome, peers, victims
from bench.figures import Figure, Section, interleaved, numbered
from bench.load import Plan
from bench.peers import (
    WORKERS,
    Peer,
    Running,
    Site,
    carrying_uvicorn,
    plain,
    under_steer,
    uvicorn,
)
from bench.servers import tool

T = TypeVar("T")
OURS = "least-conn"
RATE = 300.0
"""Connections a second."""
AT_MOST_STRANDED = 2
AT_MOST_UNEVEN_PERCENT = 5.0
_WARM = 10
"""In the first round, which is not counted."""
_TIMEOUT_S = 1.0
"""Then a connection is taken to be stranded."""
_APP = "bench.apps:whoami"
_PORT = 9880


def sections(quick: bool) -> Iterator[Section]:
    """How even, and how many are stranded."""
    rounds, connections, stopped = (1, 100, 40) if quick else (3, 1500, 400)
    failures: list[str] = []
    with ExitStack() as stack:
        running = peers.all_running(_peers(quick), _PORT, WORKERS, stack, failures)
        counts = interleaved(_subjects(running, partial(_counts, connections)), rounds)
        stranded = interleaved(_subjects(running, partial(_stranded, stopped)), rounds)
    about = f"{WORKERS} workers, {RATE:g} connections/s, async app"
    yield Section(f"{about}: most off even", _uneven(counts), failures)
    yield Section(f"{about}, 1 stopped: stranded, of {stopped}", _lost(stranded))


def _peers(quick: bool) -> list[Peer]:
    """Nobody is to see that a worker was stopped: that is what `hang` is for."""
    carried = ("--hang-timeout", "0", *carrying_uvicorn(_APP))
    policies = (OURS,) if quick else (OURS, "round-robin", "random", "hash", "cpu", "kernel")
    ours = [under_steer(name, WORKERS, "--policy", name, *carried) for name in policies]
    theirs = [plain("uvicorn --workers", uvicorn(WORKERS, _APP)), plain("granian", _granian)]
    return [*ours, *theirs[: 1 if quick else None]]


def _granian(at: Site) -> list[str]:
    more = ("--workers", str(WORKERS), "--interface", "asgi")
    return [tool("granian"), "--port", str(at.port), *more, _APP]


def _subjects(
    running: Mapping[str, Running], measure: Callable[[Running, int], T]
) -> dict[str, Callable[[], T]]:
    return {name: numbered(partial(measure, one)) for name, one in running.items()}


def _plan(connections: int, running: Running, turn: int) -> Plan:
    return Plan(
        running.site.port,
        rate=RATE,
        seed=turn,
        at_most=connections if turn else _WARM,
        timeout_s=_TIMEOUT_S,
    )


def _counts(connections: int, running: Running, turn: int) -> Counter[str]:
    """How many each worker had, by its process id."""
    with load.load(_plan(connections, running, turn)) as client:
        return Counter(request.body for request in client.finish())


def _stranded(connections: int, running: Running, turn: int) -> int:
    """How many were not answered while a worker was stopped. Evenly spaced: in a burst the others
    have work too, and one more for the worker that is stopped is fair."""
    plan = msgspec.structs.replace(_plan(connections, running, turn), seed=None)
    workers = running.workers()
    with victims.victim(workers[turn % len(workers)]) as victim:
        victim.stop(plan.port)
        try:
            with load.load(plan) as client:
                return outcome.failures(client.finish()).total()
        finally:
            victim.go_on()


def _uneven(found: Mapping[str, Sequence[Counter[str]]]) -> list[Figure]:
    """Its name says the counts of the last round."""
    figures = []
    for name, rounds in found.items():
        last = "/".join(str(count) for _, count in rounds[-1].most_common())
        at_most = AT_MOST_UNEVEN_PERCENT if name == OURS else None
        figures.append(Figure(f"{name}, last {last}", "%", tuple(map(off_even, rounds)), at_most))
    return figures


def off_even(counts: Counter[str]) -> float:
    """How far the worker farthest from an even share is from it, in percent of that share."""
    even = counts.total() / WORKERS
    idle = WORKERS - len(counts)
    return 100 * max(abs(count - even) for count in [*counts.values(), *[0] * idle]) / even


def _lost(found: Mapping[str, Sequence[int]]) -> list[Figure]:
    return [
        Figure(name, "", tuple(counts), AT_MOST_STRANDED if name == OURS else None)
        for name, counts in found.items()
    ]
