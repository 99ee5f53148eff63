"""How long requests take whose workers serve one at a time: by policy, and beside others.

An open loop asks, and a request's time counts from when it was due, so that nothing a queue holds
up is left out. What is asked, and when, is drawn beforehand, once for each round: in a round all
are asked the very same. The workers sleep instead of computing, so eight of them fit on any
machine, and what differs is only who waits behind whom.

`light` and `throughput` are the other ends of the scale: nearly nothing to do, and too much.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

import msgspec

from bench import light, load, outcome, peers, servers, throughput
from bench.figures import Curve, Figure, Section, interleaved, numbered, ratio
from bench.load import OK, Plan, Request, schedule
from bench.peers import Peer, Running, plain, under_steer
from bench.servers import tool
from steer.errors import SteerError

OURS, KERNEL, SHARED = "least-conn", "kernel", "one shared socket"
GUNICORN, IDEAL = "gunicorn", "one queue, computed"
SHARES = {"p50": 0.5, "p99": 0.99}
_SERVE, _WSGI = "bench.blocking:serve", "bench.apps:blocking"
_WARM = 50
"""Requests of the first round, which is not counted."""
_PORT = 9860


@dataclass(frozen=True)
class Case:
    """A load, and who is to bear it.

    Args:
        mix: shares of the requests, and for how many seconds each of them keeps its worker.
        load: share of what all workers of `base` can just do.
        roams: see `Plan`.
        requests: in a round.
        base: who tells what can be done.
        wishes: what the median ratio of OURS to another is to be at most, by percentile.
    """

    title: str
    workers: int
    mix: tuple[tuple[float, float], ...]
    load: float
    roams: bool
    requests: int
    peers: Sequence[Peer]
    base: str
    wishes: Mapping[tuple[str, str], float]

    @property
    def ideal_rate(self) -> float:
        """Requests a second, were answers all that takes time."""
        return self.workers / sum(share * time_s for share, time_s in self.mix)

    def plan(self, port: int, turn: int, rate: float) -> Plan:
        at_most = self.requests if turn else _WARM
        return Plan(port, rate=rate, seed=turn, at_most=at_most, mix=self.mix, roams=self.roams)


Found = Mapping[str, Sequence[Sequence[Request]]]
"""Of each server, round by round."""


def run(quick: bool) -> Iterator[Section]:
    rounds = 1 if quick else 5
    yield from _sections(_mixed(quick), rounds)
    yield from _sections(_gunicorns(quick), rounds)
    yield from light.sections(quick)
    yield throughput.section(quick)


# ---- the loads


def _mixed(quick: bool) -> Case:
    """One in ten takes 25 times as long as the others."""
    workers, few = 8, (KERNEL, OURS)
    policies = few if quick else (*few, "hash", "round-robin", "random", "cpu")
    ours = [under_steer(name, workers, _SERVE, "--policy", name) for name in policies]
    module = [sys.executable, "-m", "bench.blocking"]
    shared = plain(SHARED, lambda at: [*module, str(at.port), str(workers)])
    return Case(
        f"mixed load at 70 %, {workers} workers: 4 ms, 1 in 10 takes 100",
        workers,
        ((0.9, 0.004), (0.1, 0.1)),
        0.7,
        True,
        400 if quick else 5000,
        [*ours, shared, *(() if quick else _wsgi_servers(workers))],
        SHARED,
        {
            (KERNEL, "p50"): 0.25,
            (KERNEL, "p99"): 0.45,
            (SHARED, "p50"): 1.15,
            (SHARED, "p99"): 1.15,
        },
    )


def _gunicorns(quick: bool) -> Case:
    """gunicorn's own kind of worker and application, everywhere."""
    workers, one_each = 4, ("--", tool("gunicorn"), "-w", "1", _WSGI)
    policies = (OURS,) if quick else (OURS, KERNEL, "round-robin")
    ours = [under_steer(name, workers, "--policy", name, *one_each) for name in policies]
    return Case(
        f"gunicorn's own load at 60 %, {workers} sync workers: 50 ms",
        workers,
        ((1.0, 0.05),),
        0.6,
        False,
        60 if quick else 1000,
        [*ours, *_wsgi_servers(workers)[: 1 if quick else None]],
        GUNICORN,
        {(GUNICORN, "p99"): 1.05},
    )


def _wsgi_servers(workers: int) -> list[Peer]:
    more = str(workers)
    return [
        plain(GUNICORN, lambda at: servers.gunicorn(at.port, workers, _WSGI)),
        plain(
            "gunicorn --reuse-port",
            lambda at: [*servers.gunicorn(at.port, workers, _WSGI), "--reuse-port"],
        ),
        plain(
            "granian",
            lambda at: [
                *(tool("granian"), "--port", str(at.port), "--workers", more),
                *("--interface", "wsgi", "--blocking-threads", "1", _WSGI),
            ],
        ),
    ]


# ---- measuring


def _sections(case: Case, rounds: int) -> Iterator[Section]:
    failures: list[str] = []
    with ExitStack() as stack:
        running = peers.all_running(case.peers, _PORT, case.workers, stack, failures)
        if case.base not in running:
            raise SteerError(case.title, f"without {case.base}", detail="\n".join(failures))
        rate = case.load * _can_do(case, running[case.base])
        subjects = {name: numbered(partial(_ask, case, rate, one)) for name, one in running.items()}
        found = interleaved(subjects, rounds)
    found[IDEAL] = tuple(
        one_queue(case.plan(0, turn, rate), case.workers) for turn in range(1, rounds + 1)
    )
    yield Section(case.title, [Figure("requests", "/s", (rate,))])
    yield Section(f"{case.title}: p50", _times(found, "p50"), failures, (), _curves(case, found))
    yield Section(f"{case.title}: p99", _times(found, "p99"), _failed(found))
    for base in dict.fromkeys(base for base, _ in case.wishes):
        if base in found:
            for share in SHARES:
                yield Section(f"{case.title}: {share} to {base}", _ratios(case, found, share, base))


def _ask(case: Case, rate: float, running: Running, turn: int) -> list[Request]:
    with load.load(case.plan(running.site.port, turn, rate)) as client:
        return client.finish()


def _can_do(case: Case, running: Running) -> float:
    """How many a second, from how long it takes with what comes twice as fast as it could be done
    were answers all that takes time."""
    plan = case.plan(running.site.port, 1, 2 * case.ideal_rate)
    plan = msgspec.structs.replace(plan, at_most=plan.at_most // 2)
    with load.load(plan) as client:
        requests = client.finish()
    began_s = min(each.begun_s for each in requests)
    took_s = max(each.ended_s for each in requests) - began_s
    busy_s = sum(due.takes_s for due in schedule(plan)) / case.workers
    return case.ideal_rate * busy_s / took_s


def one_queue(plan: Plan, workers: int) -> list[Request]:
    """What would become of these requests if whoever is idle took the next at once, and nothing
    but the answers took time. Pure."""
    free_s = [0.0] * workers
    requests = []
    for due in schedule(plan):
        ended_s = max(due.at_s, free_s[0]) + due.takes_s
        heapq.heapreplace(free_s, ended_s)
        requests.append(Request(due.at_s, ended_s - due.at_s, OK, 0))
    return requests


# ---- figures


def _times(found: Found, share: str) -> list[Figure]:
    return [Figure(name, "ms", _percentiles(rounds, share)) for name, rounds in found.items()]


def _ratios(case: Case, found: Found, share: str, base: str) -> list[Figure]:
    theirs = _percentiles(found[base], share)
    return [
        ratio(
            name,
            _percentiles(rounds, share),
            theirs,
            case.wishes.get((base, share)) if name == OURS else None,
        )
        for name, rounds in found.items()
        if name != base
    ]


def _percentiles(rounds: Sequence[Sequence[Request]], share: str) -> tuple[float, ...]:
    return tuple(outcome.percentile_ms(requests, SHARES[share]) for requests in rounds)


def _curves(case: Case, found: Found) -> list[Curve]:
    ours = {peer.name for peer in case.peers if peer.is_steer}
    return [
        Curve(
            name,
            sorted(1000 * each.took_s for each in chain.from_iterable(rounds)),
            is_steer=name in ours,
        )
        for name, rounds in found.items()
    ]


def _failed(found: Found) -> list[str]:
    """A server that answers some quickly and others not at all is not to be compared."""
    every = {name: list(chain.from_iterable(rounds)) for name, rounds in found.items()}
    failed = {name: outcome.failures(requests) for name, requests in every.items()}
    return [f"{name}: {dict(kinds)}" for name, kinds in failed.items() if kinds]
