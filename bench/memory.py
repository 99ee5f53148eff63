"""What the controller holds, and what it does while there is nothing to do.

Beside gunicorn's arbiter, which has the same place: the parent of as many workers.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from bench import servers
from bench.figures import Figure, Section, ratio

WORKERS = 4
AT_MOST_RSS = 1.15
AT_MOST_CPU_PERCENT = 0.1
_SETTLE_S = 1.0
_PORT = 9200
_OURS, _THEIRS = "steer's controller", "gunicorn's arbiter"


@dataclass(frozen=True)
class Look:
    """A process at one moment.

    Args:
        rss_mb: resident memory.
        pss_mb: the same, with each page divided among those that share it.
        cpu_ns: time on a CPU so far.
        wakes: how often it has slept so far.
    """

    rss_mb: float
    pss_mb: float
    cpu_ns: int
    wakes: int


def run(quick: bool) -> list[Section]:
    rounds, idle_s = (1, 0.5) if quick else (5, 10.0)
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        environment = servers.environment(directory)
        found = [_round(environment, idle_s) for _ in range(rounds)]
    section = f"memory, {WORKERS} workers, {idle_s:g} s idle"
    return [Section(section, _figures(found, idle_s))]


Pair = tuple[Look, Look]


def _round(environment: Mapping[str, str], idle_s: float) -> dict[str, Pair]:
    """Both at once: before and after a while in which nothing happens."""
    commands = {
        _OURS: servers.steer_run(_PORT, WORKERS),
        _THEIRS: servers.gunicorn(_PORT + 1, WORKERS),
    }
    with ExitStack() as stack:
        running = {}
        for port, (name, command) in enumerate(commands.items(), _PORT):
            running[name] = stack.enter_context(servers.server(command, port, environment))
            running[name].first_answer_s()
        time.sleep(_SETTLE_S)
        before = {name: look(server.pid) for name, server in running.items()}
        time.sleep(idle_s)
        return {name: (before[name], look(server.pid)) for name, server in running.items()}


def look(pid: int) -> Look:
    """See proc_pid_smaps(5), proc_pid_status(5) and Documentation/scheduler/sched-stats.rst.

    The time is that of the scheduler, in nanoseconds: ticks would show nothing at all.
    """
    memory, status = _fields(pid, "smaps_rollup"), _fields(pid, "status")
    cpu_ns = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat") as file:
            cpu_ns += int(file.read().split()[0])
    return Look(
        rss_mb=_kilobytes(memory["Rss"]) / 1024,
        pss_mb=_kilobytes(memory["Pss"]) / 1024,
        cpu_ns=cpu_ns,
        wakes=int(status["voluntary_ctxt_switches"]),
    )


def pss_mb(pid: int) -> float:
    """The resident memory of a process, with each page divided among those that share it."""
    return _kilobytes(_fields(pid, "smaps_rollup")["Pss"]) / 1024


def _fields(pid: int, name: str) -> dict[str, str]:
    with open(f"/proc/{pid}/{name}") as file:
        return dict(line.split(":", 1) for line in file if ":" in line)


def _kilobytes(field: str) -> int:
    return int(field.split()[0])


def _figures(found: list[dict[str, Pair]], idle_s: float) -> list[Figure]:
    figures = []
    for name in (_OURS, _THEIRS):
        pairs = [each[name] for each in found]
        cpu = tuple((b.cpu_ns - a.cpu_ns) / idle_s / 1e7 for a, b in pairs)
        at_most = AT_MOST_CPU_PERCENT if name == _OURS else None
        figures += [
            Figure(f"{name}, RSS", "MB", tuple(after.rss_mb for _, after in pairs)),
            Figure(f"{name}, PSS", "MB", tuple(after.pss_mb for _, after in pairs)),
            Figure(f"{name}, CPU while idle", "% of a core", cpu, at_most),
            Figure(f"{name}, wake-ups while idle", "", tuple(b.wakes - a.wakes for a, b in pairs)),
        ]
    ours, theirs = ([each[name][1].rss_mb for each in found] for name in (_OURS, _THEIRS))
    return [*figures, ratio(f"{_OURS} to {_THEIRS}, RSS", ours, theirs, AT_MOST_RSS)]
