"""A policy is changed for another on a live service, again and again, from each to each.

Datagrams and connections come all the while: at a pace, as it is not receive buffers that are
tried. The time is that of the request at the control socket until its answer, every policy having
been there once; a command that asks takes the start of Python on top.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from bench import datagrams, load, outcome, peers, servers
from bench.figures import Figure, Section
from bench.load import Plan, Request
from bench.peers import WORKERS, Running, under_steer
from bench.servers import HOST, ROOT, tool
from steer.control import client, find
from steer.policy.builtin import KERNEL, POLICIES

AT_MOST_MS = 5.0
RATE = 300.0
"""Connections a second."""
OWN = "own"
_PAUSE_S = 0.12
_SETTLE_S = 0.5
_PORT = 9850


@dataclass(frozen=True)
class _Found:
    """What was done, and what became of what was sent meanwhile.

    Args:
        took_ms: of each change, by the policy it was to.
        without_ms: the same, every other one to the kernel's own hash, where no program is.
        lines: what workers wrote down, a datagram each.
    """

    took_ms: Mapping[str, Sequence[float]]
    without_ms: Mapping[str, Sequence[float]]
    requests: Sequence[Request]
    sent: int
    lines: Counter[str]


def run(quick: bool) -> list[Section]:
    """Raises SteerError: a change was refused."""
    swaps = 30 if quick else 1000
    options = ("-b", f"udp://{HOST}:{_PORT}", "--policy", "hash", "bench.datagrams:serve_both")
    peer = under_steer("steer", WORKERS, *options)
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        file = Path(directory, "received")
        file.touch()
        policies = [*(name for name in POLICIES if name != KERNEL), custom_policy(Path(directory))]
        with peers.running(peer, _PORT, {datagrams.FILE: str(file)}) as running:
            found = _swap(running, file, policies, swaps)
    about = f"{swaps:,} changes of policy, a flood of datagrams and {RATE:g} connections/s"
    return [Section(about, _lost(found)), Section(f"{about}: a change takes", _took(found))]


def custom_policy(directory: Path) -> str:
    """A custom policy, as `steer policies new` writes it."""
    subprocess.run(
        [tool("steer"), "policies", "new", OWN], cwd=directory, capture_output=True, check=True
    )
    return str(directory / f"{OWN}.c")


def _swap(running: Running, file: Path, policies: Sequence[str], swaps: int) -> _Found:
    path = find.locate(servers.name(_PORT), None, running.site.environment)
    for each in policies:
        _change(path, each)
    with load.load(Plan(_PORT, rate=RATE, seed=1)) as requests, _flood(file) as flood:
        time.sleep(_SETTLE_S)
        took_ms = _changes(path, walk(policies, swaps))
        without_ms = _changes(path, chain.from_iterable((KERNEL, each) for each in policies))
        sent = int(flood.communicate()[0])
        time.sleep(_SETTLE_S)
        done = requests.finish()
    return _Found(took_ms, without_ms, done, sent, Counter(file.read_text().split()))


def _changes(path: Path, policies: Iterable[str]) -> dict[str, list[float]]:
    """To one after the other."""
    took_ms: dict[str, list[float]] = {}
    for policy in policies:
        took_ms.setdefault(Path(policy).stem, []).append(_change(path, policy))
        time.sleep(_PAUSE_S)
    return took_ms


def walk(policies: Sequence[str], steps: int) -> Iterator[str]:
    """By chance, but never to where it is: from each to each."""
    chance = random.Random(1)
    here = policies[-1]
    for _ in range(steps):
        here = chance.choice([each for each in policies if each != here])
        yield here


def _change(path: Path, policy: str) -> float:
    """How long it took, in ms."""
    begun_s = time.perf_counter()
    client.ask(path, "policy", timeout_s=None, policy=policy)
    return 1000 * (time.perf_counter() - begun_s)


@contextmanager
def _flood(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Until its standard input is closed; then it says how many it has sent."""
    command = [sys.executable, "-m", "bench.datagrams", str(_PORT), str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _lost(found: _Found) -> list[Figure]:
    lost = found.sent - len(found.lines)
    twice = found.lines.total() - len(found.lines)
    return [
        outcome.failed("connections", found.requests, at_most=0),
        Figure(f"datagrams lost, of {found.sent:,}", "", (lost,), at_most=0),
        Figure("datagrams received twice", "", (twice,), at_most=0),
    ]


def _took(found: _Found) -> list[Figure]:
    every_ms = sorted(chain.from_iterable(found.took_ms.values()))
    from_kernel_ms = dict(found.without_ms)
    to_kernel_ms = from_kernel_ms.pop(KERNEL)
    p99_ms = every_ms[int(0.99 * len(every_ms))]
    return [
        Figure("all", "ms", tuple(every_ms), AT_MOST_MS),
        Figure("all, p99", "ms", (p99_ms,), AT_MOST_MS),
        *(Figure(f"to {name}", "ms", tuple(ms)) for name, ms in sorted(found.took_ms.items())),
        Figure("to the kernel's hash", "ms", tuple(to_kernel_ms)),
        Figure("from there", "ms", tuple(chain.from_iterable(from_kernel_ms.values()))),
    ]
