"""What many workers take: steer beside gunicorn, uvicorn and another build, at several sizes.

Each server lives through the same, see `lifetime`, one after the other, every other round in
reverse. Of many workers there are fewer rounds, and all that is done twice comes last.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import lifetime, servers
from bench.crowd import LIMIT_S, Contender, TooLong
from bench.figures import Figure, Growth, Section
from bench.lifetime import Life, Pace, Quantity
from bench.peers import Site
from bench.servers import HOST, tool
from steer.errors import SteerError
from steer.linux import descriptors

BASE = "STEER_BENCH_BASE"
"""In the environment: the checkout of another build, set up."""
STEER, OTHER, GUNICORN, UVICORN = "steer", "steer, the other build", "gunicorn", "uvicorn"
ROUNDS: Mapping[int, int] = {4: 3, 16: 2, 64: 2, 256: 2, 1000: 1}
"""How many, by the number of workers."""
AGAIN_S = 780.0
"""What was measured once is not begun again when that is over."""
FREE_AGAIN_S = 60.0
"""So long after the last one has ended its memory may not be free yet."""
_LOOK_AGAIN_S = 0.25
FEW, MANY = 4, 1000

AT_MOST: Mapping[tuple[Quantity, int], float] = {
    (lifetime.POLICY, MANY): 50,
    (lifetime.AFTER, MANY): 50,
    (lifetime.IDLE, MANY): 0.05,
    (lifetime.STATUS, FEW): 60,
    (lifetime.STATUS, MANY): 250,
    (lifetime.DELAY, MANY): 20,
    **{(lifetime.FAILED, workers): 0 for workers in ROUNDS},
}
POLICY_P99_MS = 5.0
TO_GUNICORN: Mapping[Quantity, Mapping[int, float]] = {
    lifetime.READY: {256: 0.06, MANY: 0.06},
    lifetime.RELOAD: {64: 0.3, 256: 0.2, MANY: 0.15},
    lifetime.LOADED: {64: 0.3, 256: 0.2, MANY: 0.15},
    lifetime.STOP: {MANY: 0.06},
}
TO_FEW: Mapping[Quantity, float] = {
    lifetime.FIRST: 1.3,
    lifetime.REPLACED: 2,
    lifetime.OTHERS: 2,
    lifetime.RSS: 1.3,
}
"""With MANY workers, to the same with FEW."""

_STEERS_READY = re.compile(rb"worker \d+ ready")
_GUNICORNS_READY = re.compile(rb"Booting worker with pid: (?P<pid>\d+)")
_UVICORNS_READY = re.compile(rb"Started server process \[(?P<pid>\d+)\]")
_DESCRIPTORS = 4
"""For each worker: what we watch it by, or one of gunicorn's, for old and new ones."""


@dataclass(frozen=True)
class Subject:
    """Args: round: from 0."""

    contender: Contender
    workers: int
    round: int


Found = Mapping[Subject, Life]


def run(quick: bool) -> Iterator[Section]:
    sizes = {2: 1, 3: 1} if quick else ROUNDS  # uvicorn has no parent of one
    pace = Pace(idle_s=0.5, changes=4, statuses=1, kills=1) if quick else Pace()
    descriptors.allow_descriptors(_DESCRIPTORS * max(sizes))
    there, failures = contenders(), list[str]()
    found = _measure(list(subjects(there, sizes)), pace, failures)
    yield from sections(found, there, failures)


# ---- who is measured


def contenders() -> list[Contender]:
    """Raises SteerError: one is not installed."""
    ours = tool("steer")
    return [
        Contender(STEER, partial(_steer, ours), _STEERS_READY, 12, ours),
        *_other_build(),
        Contender(GUNICORN, _gunicorn, _GUNICORNS_READY, 10),
        Contender(UVICORN, _uvicorn, _UVICORNS_READY, 25, most=64, most_again=0, is_slow=True),
    ]


def _other_build() -> Iterator[Contender]:
    home = os.environ.get(BASE)
    if not home:
        _say(f"{OTHER}: left out, as {BASE} names no checkout")
        return
    command = Path(home, ".venv/bin/steer")
    if not command.exists():
        raise SteerError(f"run {OTHER}", f"no {command}", "set it up: ./dev setup there")
    starts = partial(_steer, str(command))
    yield Contender(OTHER, starts, _STEERS_READY, 12, str(command), most_again=64)


def _steer(command: str, site: Site, workers: int) -> list[str]:
    _, *run = servers.steer_run(site.port, workers, "--policy", "cpu", "--ready-timeout", "120")
    return [command, *run]


def _gunicorn(site: Site, workers: int) -> list[str]:
    return servers.gunicorn(site.port, workers)


def _uvicorn(site: Site, workers: int) -> list[str]:
    """Not by `peers`: without its log it does not say who is ready."""
    return [
        *(tool("uvicorn"), "--host", HOST, "--port", str(site.port), "--workers", str(workers)),
        *("--lifespan", "off", "--no-access-log", "--loop", "asyncio", "--http", "h11"),
        "bench.apps:asgi",
    ]


# ---- measuring


def subjects(there: Sequence[Contender], sizes: Mapping[int, int]) -> Iterator[Subject]:
    """All of a round before the next; every other one in reverse."""
    for turn in range(max(sizes.values())):
        for workers in (workers for workers, rounds in sizes.items() if turn < rounds):
            able = [each for each in there if workers <= (each.most_again if turn else each.most)]
            for contender in able[:: -1 if turn % 2 else 1]:
                yield Subject(contender, workers, turn)


def _measure(wanted: Iterable[Subject], pace: Pace, failures: list[str]) -> Found:
    found = {}
    begun_s, at_first_mb = time.monotonic(), available_mb()
    for each in wanted:
        after_s = time.monotonic() - begun_s
        who = f"{each.contender.name}, {each.workers} workers, round {each.round + 1}"
        room_mb = wait_for_room(each, at_first_mb)
        if why := no_room(each, room_mb) or no_time(each, after_s):
            _say(f"{who}: left out, as {why}")
            continue
        _say(f"{who}, after {after_s:.0f} s")
        found[each] = Life()
        try:
            lifetime.live(each.contender, each.workers, pace, found[each])
        except TooLong:
            failures.append(f"{who}: something took longer than {LIMIT_S:.0f} s")
        except SteerError as error:
            failures.append(f"{who}: {error}\n{error.detail}".rstrip())
    return found


def no_time(subject: Subject, after_s: float) -> str:
    """Why it is not to be measured again; empty if it is."""
    return f"{AGAIN_S:.0f} s are over" if subject.round and after_s > AGAIN_S else ""


def no_room(subject: Subject, available_mb: float) -> str:
    """Why it cannot be measured; empty if it can."""
    needed_mb = subject.workers * subject.contender.worker_mb
    if needed_mb <= available_mb:
        return ""
    return f"it would take {needed_mb:,.0f} MB of memory, and {available_mb:,.0f} are available"


def available_mb() -> float:
    """MemAvailable of proc_meminfo(5)."""
    with open("/proc/meminfo") as file:
        (line,) = (line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) / 1024


def wait_for_room(
    subject: Subject,
    at_first_mb: float,
    look: Callable[[], float] = available_mb,
    pause: Callable[[float], None] = time.sleep,
) -> float:
    """What is available, as soon as that is enough: the kernel frees some of what a thousand
    processes had only after they have ended. Where it was not enough at first, nobody waits."""
    room_mb = look()
    for _ in range(int(FREE_AGAIN_S / _LOOK_AGAIN_S)):
        if not no_room(subject, room_mb) or no_room(subject, at_first_mb):
            break
        pause(_LOOK_AGAIN_S)
        room_mb = look()
    return room_mb


def _say(words: str) -> None:
    print(f"bench:   {words}", file=sys.stderr)


# ---- what was found


def sections(
    found: Found, there: Sequence[Contender], failures: Sequence[str] = ()
) -> Iterator[Section]:
    """One for each quantity that was measured of anybody."""
    for quantity in lifetime.ALL:
        grown = [growth for each in there if (growth := _growth(found, each, quantity)).values]
        if not grown:
            continue
        figures = [
            figure
            for growth in grown
            for figure in _figures(growth, quantity, is_ours=growth.name == STEER)
        ]
        figures += [*_to_gunicorn(found, quantity), *_to_few(found, quantity)]
        title = f"growth: {quantity.name}"
        yield Section(title, figures, failures, growths=grown, unit=quantity.unit)
        failures = ()


def _growth(found: Found, contender: Contender, quantity: Quantity) -> Growth:
    values: dict[int, list[float]] = {}
    more_than = set()
    for subject, life in found.items():
        if subject.contender is contender and quantity in life.values:
            values.setdefault(subject.workers, []).extend(life.values[quantity])
            if quantity in life.given_up:
                more_than.add(subject.workers)
    is_steer = contender.tool is not None
    return Growth(contender.name, values, frozenset(more_than), is_steer)


def _figures(growth: Growth, quantity: Quantity, is_ours: bool) -> Iterator[Figure]:
    for workers, values in sorted(growth.values.items()):
        name = f"{growth.name}, {workers:,} workers"
        given_up = ", given up" if workers in growth.more_than else ""
        at_most = AT_MOST.get((quantity, workers)) if is_ours else None
        yield Figure(name + given_up, quantity.unit, tuple(values), at_most)
        if is_ours and quantity is lifetime.POLICY and workers == FEW:
            p99 = sorted(values)[int(0.99 * len(values))]
            yield Figure(f"{name}, p99", quantity.unit, (p99,), POLICY_P99_MS)


def _to_gunicorn(found: Found, quantity: Quantity) -> Iterator[Figure]:
    """Within a round."""
    for workers, at_most in TO_GUNICORN.get(quantity, {}).items():
        ours = _by_round(found, STEER, workers, quantity)
        theirs = _by_round(found, GUNICORN, workers, quantity)
        name = f"{STEER} to {GUNICORN}, {workers:,} workers"
        yield from _ratio(name, ours, theirs, at_most)


def _to_few(found: Found, quantity: Quantity) -> Iterator[Figure]:
    if quantity in TO_FEW:
        many = _by_round(found, STEER, MANY, quantity)
        few = _by_round(found, STEER, FEW, quantity)
        name = f"{STEER}, {MANY:,} workers to {FEW}"
        yield from _ratio(name, many, few, TO_FEW[quantity])


def _ratio(
    name: str, ours: Mapping[int, float], theirs: Mapping[int, float], at_most: float
) -> Iterator[Figure]:
    values = tuple(ours[turn] / theirs[turn] for turn in sorted(ours.keys() & theirs.keys()))
    if values:
        yield Figure(name, "×", values, at_most)


def _by_round(found: Found, name: str, workers: int, quantity: Quantity) -> dict[int, float]:
    return {
        subject.round: median
        for subject, life in found.items()
        if (subject.contender.name, subject.workers) == (name, workers)
        if (median := life.median(quantity)) is not None
    }
