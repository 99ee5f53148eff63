"""How long from exec to the first full answer, everything that can be cached cached.

A client tries to connect every millisecond and asks at once. Beside each of ours
stands what somebody would else have run, in the same round.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bench import servers
from bench.figures import Figure, Section, interleaved, ratio
from bench.servers import tool

WORKERS = 4
_PORT = 9100
_DEMO, _GUNICORN = "steer run, the demo", "gunicorn, trivial WSGI app"
_UNDER_STEER, _UVICORN = "uvicorn under steer run", "uvicorn --workers"
_HELP, _CLICK = "steer --help", "python -c 'import click'"
AT_MOST = {(_DEMO, _GUNICORN): 0.9, (_UNDER_STEER, _UVICORN): 1.0, (_HELP, _CLICK): 1.3}


def run(quick: bool) -> list[Section]:
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        environment = servers.environment(directory)
        subjects: dict[str, Callable[[], float]] = {
            name: partial(_first_answer_ms, command, _PORT, environment)
            for name, command in _servers(_PORT).items()
        }
        subjects[_HELP] = partial(_whole_ms, [tool("steer"), "--help"], environment)
        subjects[_CLICK] = partial(_whole_ms, [sys.executable, "-c", "import click"], environment)
        found = interleaved(subjects, 1 if quick else 21)
    return [Section(f"start, {WORKERS} workers", _figures(found))]


def _servers(port: int) -> dict[str, list[str]]:
    uvicorn = [tool("uvicorn"), "bench.apps:asgi", "--lifespan", "off"]
    return {
        _DEMO: servers.steer_run(port, WORKERS, "--policy", "cpu"),
        _GUNICORN: servers.gunicorn(port, WORKERS),
        _UNDER_STEER: servers.steer_run(port, WORKERS, "--", *uvicorn, "--fd", "{fd}"),
        _UVICORN: [*uvicorn, "--workers", str(WORKERS), "--port", str(port)],
    }


def _first_answer_ms(command: Sequence[str], port: int, environment: Mapping[str, str]) -> float:
    with servers.server(command, port, environment) as server:
        return 1000 * server.first_answer_s()


def _whole_ms(command: Sequence[str], environment: Mapping[str, str]) -> float:
    started_s = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return 1000 * (time.perf_counter() - started_s)


def _figures(found: Mapping[str, tuple[float, ...]]) -> list[Figure]:
    times = [Figure(name, "ms", values) for name, values in found.items()]
    ratios = [
        ratio(f"{ours} to {theirs}", found[ours], found[theirs], at_most)
        for (ours, theirs), at_most in AT_MOST.items()
    ]
    return times + ratios
