"""What a hundred starts and stops leave behind. It ought to be nothing.

Others may use BPF and /run/steer on this machine meanwhile. What one of their
processes has open is theirs; a process is ours if it carries our mark in its
environment, which all that descend from a service inherit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench import servers
from bench.figures import Figure, Section
from bench.servers import Server, tool
from steer.control import rundir
from steer.errors import SteerError

WORKERS = 4
_PORT = 9300
_NAME = servers.name(_PORT)
_MARK = "BENCH_LEAKS"
_SYSTEMS_EVERY = 10
"""So often /run/steer is used, not a directory of our own."""
_PATIENCE_S = 10.0
"""The kernel frees what BPF leaves a moment later, after RCU grace periods."""

Kept = dict[str, set[str]]


def run(quick: bool) -> list[Section]:
    """Raises SteerError: no bpftool, or a service that does not start or end."""
    times = 4 if quick else 100
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        ours = servers.environment(directory, **{_MARK: _NAME})
        systems = {key: value for key, value in ours.items() if key != "STEER_RUNTIME_DIR"}
        before = _kept(ours)
        took_ms = tuple(
            _start_and_stop(systems if turn % _SYSTEMS_EVERY == 1 else ours, turn % 2 == 0)
            for turn in range(times)
        )
        left = _left(before, ours)
    for kind, names in left.items():
        if names:
            print(f"left behind, {kind}: {', '.join(sorted(names))}", file=sys.stderr)
    figures = [Figure(f"{kind} left", "", (len(names),), 0) for kind, names in left.items()]
    took = Figure("one start and stop", "ms", took_ms)
    return [Section(f"leaks, {times} starts and stops", [*figures, took])]


def _start_and_stop(environment: Mapping[str, str], by_signal: bool) -> float:
    """Start, wait for an answer, end: by SIGTERM or by `steer stop`. Returns milliseconds."""
    began_s = time.perf_counter()
    command = servers.steer_run(_PORT, WORKERS)
    with servers.server(command, _PORT, environment) as server:
        server.first_answer_s()
        if not by_signal:
            _ask_to_stop(server, environment)
    return 1000 * (time.perf_counter() - began_s)


def _ask_to_stop(server: Server, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [tool("steer"), "stop", _NAME], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SteerError(f"steer stop {_NAME}", done.stderr.strip())
    server.wait()


def _left(before: Kept, environment: Mapping[str, str]) -> Kept:
    """What was not there before, once it has had time to go."""
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        now = _kept(environment)
        left = {kind: now[kind] - before[kind] for kind in now}
        if not any(left.values()) or time.monotonic() > until_s:
            return left
        time.sleep(0.1)


def _kept(environment: Mapping[str, str]) -> Kept:
    return {
        "BPF programs": _bpf("prog"),
        "BPF maps": _bpf("map"),
        "processes": _processes(),
        "files in run directories": _files(environment),
        "sockets": _sockets(),
    }


def _bpf(kind: str) -> set[str]:
    """Programs or maps that no process holds: those of a killed worker, say."""
    try:
        shown = subprocess.run(["bpftool", "-j", kind, "show"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SteerError(f"bpftool {kind} show", str(error), "run ./dev setup as root") from None
    objects = {str(each["id"]): str(each.get("name")) for each in json.loads(shown.stdout)}
    return {f"{number} {name}" for number, name in objects.items()} - {
        f"{number} {objects.get(number)}" for number in _held(f"{kind}_id")
    }


def _held(field: str) -> set[str]:
    """The ids of BPF objects that processes have open (proc_pid_fdinfo(5))."""
    held = set()
    for path in Path("/proc").glob("[0-9]*/fdinfo/*"):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        held |= {line.split()[1] for line in lines if line.startswith(f"{field}:")}
    return held


def _processes() -> set[str]:
    mark = f"{_MARK}={_NAME}".encode()
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.add(path.parent.name)
        except OSError:
            continue
    return found


def _files(environment: Mapping[str, str]) -> set[str]:
    """Ours, and directories that stand empty."""
    found = set()
    for directory in (*rundir.directories(environment), *rundir.directories({})):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            continue
        found |= {str(directory / name) for name in names if _NAME in name}
        if not names:
            found.add(str(directory))
    return found


def _sockets() -> set[str]:
    """Listening or bound in this network namespace, which is ours alone."""
    shown = subprocess.run(["ss", "-Hanlxtu"], capture_output=True, text=True, check=True)
    return set(shown.stdout.splitlines())
