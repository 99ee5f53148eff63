"""A worker is killed every 200 ms, always the one that has served longest.

It is stopped first, for as long as it takes to see what it had accepted; that is counted apart,
see `victims`. A server that gives up and ends is asked no more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from bench import load, outcome, peers, victims
from bench.figures import Figure, Section
from bench.load import Plan, Request
from bench.peers import Peer, Running
from bench.victims import Stop

CONCURRENCY = 16
EVERY_S = 0.2
_START_S = 1.0
_PORT = 9700


@dataclass(frozen=True)
class _Found:
    """Requests that no killed worker had accepted, and those that one had.

    Args:
        lasted_s: until the end, or until the server had ended.
    """

    others: Sequence[Request]
    accepted: Sequence[Request]
    kills: Sequence[Stop]
    lasted_s: float
    has_ended: bool


def run(quick: bool) -> list[Section]:
    whom, for_s = (peers.FEW, 1.0) if quick else (peers.ALL, 20.0)
    failures: list[str] = []
    found = peers.each(whom, partial(_crash, for_s), failures)
    title = f"a worker killed every {EVERY_S:g} s for {for_s:g} s, c={CONCURRENCY}"
    counted, apart, kills = [], [], []
    for peer, each in found.items():
        at_most = 0 if peer.is_steer else None
        counted.append(outcome.failed(peer.name + _end(each), each.others, at_most))
        apart.append(outcome.failed(f"{peer.name}, accepted by one", each.accepted, None))
        kills.append(Figure(f"{peer.name}, kills", "", (len(each.kills),)))
    lines = [
        outcome.timeline(peer.name, each.others, [kill.at_s for kill in each.kills])
        for peer, each in found.items()
    ]
    return [Section(title, [*counted, *apart, *kills], failures, lines)]


def _end(found: _Found) -> str:
    return f", which ended itself after {found.lasted_s:.1f} s" if found.has_ended else ""


def _crash(for_s: float, peer: Peer) -> _Found:
    plan = Plan(_PORT, concurrency=CONCURRENCY)
    with peers.running(peer, _PORT) as running, load.load(plan) as client:
        time.sleep(_START_S)
        begun_s = time.monotonic()
        kills = list(_kills(running, begun_s, for_s))
        has_ended, lasted_s = running.has_ended(), time.monotonic() - begun_s
        others, accepted = victims.apart(client.finish(), kills)
    return _Found(others, accepted, kills, lasted_s, has_ended)


def _kills(running: Running, begun_s: float, for_s: float) -> Iterator[Stop]:
    """One every turn, as long as there is somebody to kill."""
    for turn in range(round(for_s / EVERY_S)):
        time.sleep(max(begun_s + turn * EVERY_S - time.monotonic(), 0))
        if running.has_ended():
            return
        for pid in running.workers()[:1]:
            with contextlib.suppress(ProcessLookupError), victims.victim(pid) as victim:
                yield _kill(victim)
    time.sleep(EVERY_S)


def _kill(victim: victims.Victim) -> Stop:
    stop = victim.stop(_PORT)
    victim.kill()
    return stop
