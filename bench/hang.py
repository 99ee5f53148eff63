"""One of four workers is stopped, for good or for a while, and clients go on coming.

They come at a steady rate whatever becomes of them, and their time counts from when they were due.
What the worker had accepted when it was stopped is counted apart; see `victims`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench import load, outcome, peers, victims
from bench.figures import Figure, Section
from bench.load import Plan, Request
from bench.peers import WORKERS, Peer

RATE = 300.0
"""Connections a second."""
HANG_TIMEOUT_S = 2.0
"""The default of --hang-timeout."""
SLOW_S = HANG_TIMEOUT_S + 1
AT_MOST_SLOW_PERCENT = 0.1
LONG_S = 1.0
_START_S = 0.5
_PORT = 9600


@dataclass(frozen=True)
class Size:
    """Whom to compare, and how long things last, in seconds; --quick is short.

    Args:
        before_s: with all workers.
        good_s: from the stop on, where it is for good.
        while_s: of the stop, where it ends.
        after_s: it ended.
        timeout_s: of a request.
    """

    peers: Sequence[Peer] = peers.ALL
    before_s: float = 2.0
    good_s: float = 12.0
    while_s: float = 5.0
    after_s: float = 1.5
    timeout_s: float = 10.0


_QUICK = Size(peers.FEW, 0.5, 3.0, 0.5, 0.2, 4.0)


@dataclass(frozen=True)
class _Found:
    """Requests that the stopped worker had not accepted, and those it had.

    Args:
        stop_s: when it was stopped.
    """

    others: Sequence[Request]
    accepted: Sequence[Request]
    stop_s: float


def run(quick: bool) -> Iterator[Section]:
    size = _QUICK if quick else Size()
    yield from _for_good(size)
    yield _for_a_while(size)


def _for_good(size: Size) -> Iterator[Section]:
    failures: list[str] = []
    found = peers.each(size.peers, partial(_stop, size, for_good=True), failures)
    about = f"1 of {WORKERS} workers stopped for good, {RATE:g} connections/s for {size.good_s:g} s"
    lines = [outcome.timeline(peer.name, x.others, [x.stop_s]) for peer, x in found.items()]
    yield Section(about, _unanswered(found), failures, lines)
    yield Section(f"{about}: over {SLOW_S:g} s", _slow(found))


def _for_a_while(size: Size) -> Section:
    failures: list[str] = []
    found = peers.each(size.peers, partial(_stop, size, for_good=False), failures)
    about = f"1 of {WORKERS} workers stopped for {size.while_s:g} s, {RATE:g} connections/s"
    figures = [
        Figure(f"{peer.name}, of {len(x.others):,}", "", (outcome.over(x.others, LONG_S),))
        for peer, x in found.items()
    ]
    return Section(f"{about}: over {LONG_S:g} s", figures, failures)


def _stop(size: Size, peer: Peer, *, for_good: bool) -> _Found:
    plan = Plan(_PORT, rate=RATE, seed=1, timeout_s=size.timeout_s)
    with (
        peers.running(peer, _PORT) as running,
        victims.victim(running.workers()[0]) as victim,
        load.load(plan) as client,
    ):
        time.sleep(_START_S + size.before_s)
        stop = victim.stop(_PORT)
        time.sleep(size.good_s if for_good else size.while_s)
        if not for_good:
            victim.go_on()
            time.sleep(size.after_s)
        others, accepted = victims.apart(client.finish(), [stop])
    return _Found(others, accepted, stop.at_s)


def _unanswered(found: Mapping[Peer, _Found]) -> list[Figure]:
    """First what it had not accepted, which is what counts, then what it had."""
    figures = []
    for peer, each in found.items():
        at_most = 0 if peer.is_steer else None
        figures.append(outcome.failed(peer.name, each.others, at_most))
    for peer, each in found.items():
        name = f"{peer.name}, accepted by it"
        figures.append(outcome.failed(name, each.accepted, None))
    return figures


def _slow(found: Mapping[Peer, _Found]) -> list[Figure]:
    figures = []
    for peer, each in found.items():
        percent = 100 * outcome.over(each.others, SLOW_S) / len(each.others)
        at_most = AT_MOST_SLOW_PERCENT if peer.is_steer else None
        figures.append(Figure(peer.name, "%", (percent,), at_most))
    return figures
