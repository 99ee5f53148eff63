"""What a server with many workers goes through once, from its start to its end, and how long each
thing takes."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import load, memory, outcome, victims
from bench.crowd import LIMIT_S, Contender, Crowd, TooLong, crowd
from bench.load import Plan, Request
from bench.victims import Stop
from steer.errors import SteerError

CONCURRENCY = 64
RATE = 300.0
"""Connections a second while workers are killed."""
_POLICIES = ("hash", "cpu")
_SETTLE_S = 1.0
_LOAD_S = 0.8
"""For a client to start, and for what follows an act."""
_BETWEEN_CHANGES_S = 0.01
_CHANGES_S = 5.0
_PORT = 9950


@dataclass(frozen=True)
class Quantity:
    name: str
    unit: str


FIRST = Quantity("first answer", "s")
READY = Quantity("all ready", "s")
RELOAD = Quantity("reload", "s")
LOADED = Quantity(f"reload at c={CONCURRENCY}", "s")
FAILED = Quantity("requests failed meanwhile", "")
DELAY = Quantity("loop delay during a reload, p99.9", "ms")
POLICY = Quantity("policy change", "ms")
AFTER = Quantity("policy change right after a reload", "ms")
REPLACED = Quantity("a worker killed, until another is ready", "s")
OTHERS = Quantity("others' requests meanwhile, p99", "ms")
STOP = Quantity("stop", "s")
IDLE = Quantity("CPU while idle", "% of a core")
RSS = Quantity("resident memory of the parent", "MB")
STATUS = Quantity("steer status", "ms")
ALL = (
    *(FIRST, READY, RELOAD, LOADED, FAILED, DELAY, POLICY, AFTER, REPLACED, OTHERS, STOP),
    *(IDLE, RSS, STATUS),
)


@dataclass(frozen=True)
class Pace:
    """How much is done in a life.

    Args:
        changes: of policy, while nothing else happens; fewer where they take long.
    """

    idle_s: float = 3.0
    changes: int = 20
    statuses: int = 3
    kills: int = 2


@dataclass
class Life:
    """What was measured.

    Args:
        given_up: what took longer than LIMIT_S, which then stands for its value.
        requests: made during the reload under load.
    """

    values: dict[Quantity, list[float]] = field(default_factory=dict)
    given_up: set[Quantity] = field(default_factory=set)
    requests: int = 0

    def add(self, quantity: Quantity, *values: float) -> None:
        self.values.setdefault(quantity, []).extend(values)

    def median(self, quantity: Quantity) -> float | None:
        return statistics.median(self.values[quantity]) if quantity in self.values else None

    def take(self, quantity: Quantity, measure: Callable[[], float]) -> bool:
        """Add what `measure` returns; False if it was given up."""
        try:
            self.add(quantity, measure())
        except TooLong:
            self.given_up.add(quantity)
            self.add(quantity, LIMIT_S)
        return quantity not in self.given_up


def live(contender: Contender, workers: int, pace: Pace, life: Life) -> None:
    """Until what cannot be measured, or takes too long.

    Args:
        life: gets what was measured until then.

    Raises:
        SteerError
        TooLong: something on the way.
    """
    begun_s = time.monotonic()
    with crowd(contender, workers, _PORT) as it:
        life.add(FIRST, it.server.first_answer_s())
        it.wait_ready(workers)
        life.add(READY, time.monotonic() - begun_s)
        time.sleep(_SETTLE_S)
        _be_idle(life, it, pace)
        if contender.tool:
            _ask_status(life, it, pace)
            _change_policies(life, it, pace)
        _kill(life, it, pace)
        if not _reload(life, it):
            return
        if contender.is_slow or _reload_under_load(life, it):
            life.take(STOP, it.stop)


def _be_idle(life: Life, it: Crowd, pace: Pace) -> None:
    before = memory.look(it.server.pid)
    time.sleep(pace.idle_s)
    after = memory.look(it.server.pid)
    life.add(IDLE, (after.cpu_ns - before.cpu_ns) / pace.idle_s / 1e7)
    life.add(RSS, after.rss_mb)


def _ask_status(life: Life, it: Crowd, pace: Pace) -> None:
    command, environment = it.status_command()
    for _ in range(pace.statuses):
        begun_s = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SteerError("ask for status", f"exit status {done.returncode}", detail=done.stderr)
        life.add(STATUS, 1000 * (time.monotonic() - begun_s))


def _change_policies(life: Life, it: Crowd, pace: Pace) -> None:
    """Each has been there once before, as in `swap`."""
    for policy in _POLICIES:
        _change_ms(it, policy)
    end_s = time.monotonic() + _CHANGES_S
    for turn in range(pace.changes):
        if turn and time.monotonic() > end_s:
            return
        time.sleep(_BETWEEN_CHANGES_S)
        life.add(POLICY, _change_ms(it, _POLICIES[turn % len(_POLICIES)]))


def _change_ms(it: Crowd, policy: str) -> float:
    begun_s = time.monotonic()
    it.ask("policy", policy=policy)
    return 1000 * (time.monotonic() - begun_s)


def _reload(life: Life, it: Crowd) -> bool:
    if not it.contender.tool:
        return life.take(RELOAD, it.reload)
    return life.take(
        RELOAD, lambda: it.reload(lambda: life.add(AFTER, _change_ms(it, _POLICIES[0])))
    )


def _reload_under_load(life: Life, it: Crowd) -> bool:
    before = _delays(it)
    with load.load(Plan(it.port, concurrency=CONCURRENCY)) as client:
        time.sleep(_LOAD_S)
        done = life.take(LOADED, it.reload)
        requests = client.finish()
    life.requests += len(requests)
    life.add(FAILED, outcome.failures(requests).total())
    if before is not None and done:
        life.add(DELAY, delay_ms(before, _delays(it), 0.999))
    return done


def _delays(it: Crowd) -> Any:
    """None of a server that does not count them."""
    return it.ask("status")["service"].get("loop_delay_ms") if it.contender.tool else None


def delay_ms(before: Mapping[str, Any], after: Mapping[str, Any], share: float) -> float:
    """What so large a share of the delays between two looks did not exceed: the end of a bucket.

    Args:
        before, after: `loop_delay_ms` of `status`, which counts from the controller's start.
    """
    starts_ms = [start_ms for start_ms, _ in after["buckets"]]
    counts = [b - a for (_, a), (_, b) in zip(before["buckets"], after["buckets"], strict=True)]
    ends_ms = [*starts_ms[1:], math.inf]
    up_to = itertools.accumulate(counts)
    end_ms = next(e for e, n in zip(ends_ms, up_to, strict=True) if n >= share * sum(counts))
    return float(min(end_ms, after["max"]))


def _kill(life: Life, it: Crowd, pace: Pace) -> None:
    """Others' requests are those that none of the killed had accepted."""
    stops: list[Stop] = []
    until_s: list[float] = []
    with load.load(Plan(it.port, rate=RATE)) as client:
        for _ in range(pace.kills):
            time.sleep(_LOAD_S)
            stop, took_s = it.kill_one()
            stops.append(stop)
            until_s.append(stop.at_s + took_s + _LOAD_S)
            life.add(REPLACED, took_s)
        time.sleep(_LOAD_S)
        others, _ = victims.apart(client.finish(), stops)
    for stop, end_s in zip(stops, until_s, strict=True):
        life.add(OTHERS, outcome.percentile_ms(_between(others, stop.at_s, end_s), 0.99))


def _between(requests: Sequence[Request], from_s: float, to_s: float) -> list[Request]:
    """Those that were due, or under way, in that time."""
    found = [each for each in requests if each.begun_s <= to_s and each.ended_s >= from_s]
    if not found:
        raise SteerError("measure requests", "none was made while a worker was replaced")
    return found
