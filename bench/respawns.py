"""What many reloads and respawns of a preloaded service leave: memory, descriptors, zombies."""

from __future__ import annotations

import os
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

from bench import peers
from bench.figures import Figure, Section
from bench.memory import look
from bench.peers import Running, under_steer
from steer.linux import processes

RELOADS, RESPAWNS = 200, 500
_SAMPLES = 20
_PORT = 9160
_SERVICE = ("--preload", "--policy", "round-robin", "bench.blocking:serve")


def section(quick: bool) -> Section:
    reloads, respawns = (2, 4) if quick else (RELOADS, RESPAWNS)
    few, many = (2, 2) if quick else (2, 16)
    figures = [
        *_after(few, _reload, reloads, "reload"),
        *_after(many, _respawn, respawns, "respawn"),
    ]
    return Section(f"{reloads} reloads and {respawns} respawns, preloaded", figures)


def _after(workers: int, act: Callable[[Running], None], times: int, name: str) -> list[Figure]:
    with peers.running(under_steer(name, workers, *_SERVICE), _PORT, workers=workers) as it:
        act(it)
        before = _Count(it)
        samples: list[tuple[float, float]] = []
        for turn in range(times):
            act(it)
            if turn % max(1, times // _SAMPLES) == 0:
                samples.append((look(it.server.pid).rss_mb, look(_template(it)).rss_mb))
        after = _Count(it)
    return [
        Figure(
            f"controller, RSS for each {name}", "kB", (_slope_kb([c for c, _ in samples], times),)
        ),
        Figure(
            f"template, RSS for each {name}", "kB", (_slope_kb([t for _, t in samples], times),)
        ),
        Figure(
            f"descriptors of the controller after {times}", "more", (after.files - before.files,), 0
        ),
        Figure(f"zombies after {times}", "", (after.zombies,), 0),
    ]


def _slope_kb(values_mb: list[float], times: int) -> float:
    """By the second half, as the first fills caches."""
    half = values_mb[len(values_mb) // 2 :]
    if len(half) < 2:
        return 0.0
    slope_mb = statistics.linear_regression(range(len(half)), half).slope
    return 1024 * slope_mb * len(values_mb) / times


class _Count:
    """What the controller has open, and its children that nobody has waited for."""

    def __init__(self, it: Running) -> None:
        self.files = len(os.listdir(f"/proc/{it.server.pid}/fd"))
        children = processes.children(it.server.pid)
        self.zombies = sum(processes.is_zombie(f"/proc/{pid}") for pid in children)


def _template(it: Running) -> int:
    family = processes.children(it.server.pid)
    return next(pid for pid in family if b"template" in Path(f"/proc/{pid}/cmdline").read_bytes())


def _reload(it: Running) -> None:
    peers.steer(it, "reload")


def _respawn(it: Running) -> None:
    there = it.workers()
    os.kill(there[0], signal.SIGKILL)
    it.wait_for_workers(len(there), there[:1])
