"""Python applications that steer serves itself, beside the server's own workers.

A worker has started when its lifespan says so. Memory is that of all processes together, with each
page divided among those that share it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import respawns, servers
from bench.figures import Figure, Section, interleaved, ratio
from bench.lifespan import STARTED
from bench.memory import pss_mb
from bench.servers import HOST, Server, tool
from steer.linux import processes

_PORT = 9150
_TIMEOUT_S, _LOOK_S = 60.0, 0.001
_SETTLE_S = 0.5
_STEER, _UVICORN, _GUNICORN = "steer --preload", "uvicorn --workers", "gunicorn --preload"


class App(NamedTuple):
    """What is started.

    Args:
        at_most: the targets, by what is measured and beside whom.
    """

    name: str
    app: str
    workers: int
    at_most: Mapping[tuple[str, str], float | None]


FIRST, ALL, PSS = "first answer", "all ready", "PSS"
APPS = (
    App("a small app", "bench.lifespan:asgi", 4, {(FIRST, _UVICORN): 0.7, (ALL, _UVICORN): 0.6}),
    App(
        "an app with 2 s of imports",
        "bench.heavy:asgi",
        8,
        {(ALL, _UVICORN): 0.2, (PSS, _UVICORN): 0.5, (PSS, _GUNICORN): 1.0},
    ),
)


class Start(NamedTuple):
    """One start: until the first answer, until all workers are ready, and the memory then."""

    first_s: float
    all_s: float
    pss_mb: float


def run(quick: bool) -> list[Section]:
    apps, rounds = (APPS[:1], 1) if quick else (APPS, 7)
    return [*(_section(app, rounds) for app in apps), respawns.section(quick)]


def _section(app: App, rounds: int) -> Section:
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        subjects: dict[str, Callable[[], Start]] = {
            name: partial(_start, command, app.workers, Path(directory))
            for name, command in _commands(app).items()
        }
        found = interleaved(subjects, rounds)
    title = f"{app.name}, {app.workers} workers"
    return Section(title, [*_figures(found), *_ratios(found, app)])


def _commands(app: App) -> dict[str, list[str]]:
    workers, port = str(app.workers), str(_PORT)
    served = ["--policy", "least-conn", "--server", "uvicorn", app.app]
    gunicorn = ["-k", "uvicorn_worker.UvicornWorker", "-b", f"{HOST}:{port}", app.app]
    return {
        _STEER: servers.steer_run(_PORT, app.workers, "--preload", *served),
        "steer": servers.steer_run(_PORT, app.workers, *served),
        _UVICORN: [tool("uvicorn"), "--workers", workers, "--port", port, app.app],
        _GUNICORN: [tool("gunicorn"), "--preload", "-w", workers, *gunicorn],
    }


def _start(command: Sequence[str], workers: int, directory: Path) -> Start:
    started = directory / "started"
    started.write_text("")
    environment = servers.environment(str(directory), **{STARTED: str(started)})
    began_s = time.perf_counter()
    with servers.server(command, _PORT, environment) as server:
        first_s = server.first_answer_s(_TIMEOUT_S)
        _await_started(server, started, workers)
        all_s = time.perf_counter() - began_s
        time.sleep(_SETTLE_S)
        return Start(first_s, all_s, sum(map(pss_mb, processes.descendants(server.pid))))


def _await_started(server: Server, started: Path, workers: int) -> None:
    """Raises SteerError: not all workers start."""
    end_s = time.perf_counter() + _TIMEOUT_S
    while len(started.read_text().split()) < workers:
        if time.perf_counter() > end_s:
            raise server.failure(f"not all workers start in {_TIMEOUT_S:g} s")
        time.sleep(_LOOK_S)


def _figures(found: Mapping[str, Sequence[Start]]) -> list[Figure]:
    return [
        figure
        for name, starts in found.items()
        for figure in (
            Figure(f"{name}, {FIRST}", "ms", tuple(1000 * each.first_s for each in starts)),
            Figure(f"{name}, {ALL}", "ms", tuple(1000 * each.all_s for each in starts)),
            Figure(f"{name}, {PSS} of all processes", "MB", tuple(each.pss_mb for each in starts)),
        )
    ]


_VALUES: Mapping[str, Callable[[Start], float]] = {
    FIRST: lambda each: each.first_s,
    ALL: lambda each: each.all_s,
    PSS: lambda each: each.pss_mb,
}


def _ratios(found: Mapping[str, Sequence[Start]], app: App) -> list[Figure]:
    return [
        ratio(
            f"{_STEER} to {theirs}, {what}",
            tuple(map(value, found[_STEER])),
            tuple(map(value, found[theirs])),
            app.at_most.get((what, theirs)),
        )
        for theirs in (_UVICORN, _GUNICORN)
        for what, value in _VALUES.items()
    ]
