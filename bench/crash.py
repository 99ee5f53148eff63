"""A worker is killed every 200 ms, always the one that has served longest.

It is stopped first, for as long as it takes to see what it had accepted; that is counted apart,
see `victims`. A server that gives up and ends is asked no more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench import load, outcome, peers, victims
from bench.figures import Figure, Section, ratio
from bench.load import OK, Plan, Request
from bench.peers import WORKERS, Peer, Running
from bench.victims import Stop

CONCURRENCY = 16
_APP = "bench.apps:asgi"
EVERY_S = 0.2
_WINDOW_S = 2.0
_SPARE = ("--spares", "1")
_COMMAND, _SERVED, _PRELOADED, _WSGI = (
    f"steer, {how}, a spare"
    for how in ("uvicorn as a command", "uvicorn", "uvicorn preloaded", "waitress preloaded")
)
_SPARED = (
    peers.under_steer(_COMMAND, WORKERS, *_SPARE, *peers.carrying_uvicorn(_APP)),
    peers.under_steer(_SERVED, WORKERS, *_SPARE, *peers.served_by_uvicorn(_APP)),
    peers.under_steer(_PRELOADED, WORKERS, *_SPARE, "--preload", *peers.served_by_uvicorn(_APP)),
    peers.under_steer(
        _WSGI, WORKERS, *_SPARE, "--preload", "--server", "waitress", "bench.apps:wsgi"
    ),
)
AT_LEAST = {(_COMMAND, "uvicorn --workers"): 1.0, (_WSGI, "gunicorn"): 1.0}
"""Requests answered, in terms of those of another server."""
_START_S = 1.0
_PORT = 9700


@dataclass(frozen=True)
class _Found:
    """Requests that no killed worker had accepted, and those that one had.

    Args:
        begun_s: when the first was killed, by the requests' clock.
        for_s: for how long one after the other was to be killed.
        lasted_s: until the end, or until the server had ended.
    """

    others: Sequence[Request]
    accepted: Sequence[Request]
    kills: Sequence[Stop]
    begun_s: float
    for_s: float
    lasted_s: float
    has_ended: bool


def run(quick: bool) -> list[Section]:
    whom, for_s = (peers.FEW, 1.0) if quick else ((*_SPARED, *peers.ALL), 20.0)
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
    figures = [*counted, *_throughput(found), *apart, *kills]
    return [Section(title, figures, failures, lines)]


def _throughput(found: Mapping[Peer, _Found]) -> list[Figure]:
    """How many requests each answered, and what that is in terms of others."""
    by_name = {peer.name: _answered(each) for peer, each in found.items()}
    figures = [
        Figure(f"{name}, answered in {_WINDOW_S:g} s", "", counts)
        for name, counts in by_name.items()
    ]
    ratios = [
        ratio(
            f"{ours} to {theirs}, answered",
            by_name[ours],
            [max(1.0, count) for count in by_name[theirs]],
            at_least=least,
        )
        for (ours, theirs), least in AT_LEAST.items()
        if ours in by_name and theirs in by_name
    ]
    return [*figures, *ratios]


def _answered(found: _Found) -> tuple[float, ...]:
    """In each window; none after a server has ended."""
    counts = [0.0] * max(1, round(found.for_s / _WINDOW_S))
    for request in found.others:
        at = int((request.ended_s - found.begun_s) / _WINDOW_S)
        if request.outcome == OK and 0 <= at < len(counts):
            counts[at] += 1
    return tuple(counts)


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
    return _Found(others, accepted, kills, begun_s, for_s, lasted_s, has_ended)


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
