"""Which CPUs a service may use changes while it runs, and what a worker can do without."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from testkit.capabilities import do_without
from testkit.clients import http_get
from testkit.fixtures import StartService
from testkit.processes import eventually, python, session
from testkit.programs import source
from testkit.service import STEER, Service, launch

CPUS = sorted(os.sched_getaffinity(0))
NUMBERS = {"x86_64": (203, 141), "aarch64": (122, 140)}
"""Of sched_setaffinity(2) and setpriority(2)."""
REFUSES = source("refuses_cpus")
"""Runs a command, to which the kernel refuses some system calls (seccomp(2))."""


class Cpuset:
    """A cgroup of our own, and the CPUs in it."""

    def __init__(self, parent: Path) -> None:
        self._directory = parent / f"steer-test-{os.getpid()}"
        self._parent = parent
        self._directory.mkdir()
        for name in ("mems", "cpus"):
            given = parent / f"cpuset.{name}"
            if not (parent / "cgroup.controllers").exists():
                (self._directory / f"cpuset.{name}").write_text(given.read_text())

    def allow(self, *cpus: int) -> None:
        (self._directory / "cpuset.cpus").write_text(",".join(map(str, cpus)))

    def take(self, *pids: int) -> None:
        for pid in pids:
            (self._directory / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        for pid in (self._directory / "cgroup.procs").read_text().split():
            (self._parent / "cgroup.procs").write_text(pid)
        self._directory.rmdir()


@pytest.fixture
def cpuset() -> Iterator[Cpuset]:
    """Of version 1 or 2 of cgroups."""
    with ExitStack() as undo:
        if len(CPUS) < 2:
            do_without("needs two CPUs")
        try:
            made = Cpuset(_cpusets())
        except (OSError, StopIteration) as error:
            do_without(f"needs cpuset: {error!r}")
        undo.callback(made.remove)
        yield made


def _cpusets() -> Path:
    """Where they can be made. Raises OSError, StopIteration: nowhere."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, place, kind, options, *_ in mounts:
        if kind == "cgroup" and "cpuset" in options.split(","):
            return Path(place)
    root = next(Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2")
    if "cpuset" not in (root / "cgroup.subtree_control").read_text().split():
        (root / "cgroup.subtree_control").write_text("+cpuset")
    return root


def ready(running: Service) -> list[dict[str, Any]]:
    return [each for each in running.workers() if each["state"] == "ready"]


def cpus_of(running: Service) -> list[list[int]]:
    """Of each worker that is ready, as it is said and as it is."""
    workers = ready(running)
    said = [each["cpus"] for each in workers]
    there = [sorted(os.sched_getaffinity(each["pid"])) for each in workers]
    assert said == there
    return sorted(said)


@pytest.mark.parametrize("policy", ["cpu", "hash"])
def test_follows_the_cpuset(service: StartService, cpuset: Cpuset, policy: str) -> None:
    first, second = CPUS[:2]
    every = [[first], [second]] if policy == "cpu" else [[first, second]] * 2
    running = service("-w", "2", "--policy", policy)
    cpuset.allow(first, second)
    cpuset.take(*session(running.pid))
    cpuset.allow(first)
    (crashed,) = running.workers()[1:]
    os.kill(crashed["pid"], 9)
    eventually(lambda: crashed["pid"] not in [each["pid"] for each in running.workers()])
    running.wait_ready(2)
    assert cpus_of(running) == [[first]] * 2
    was = f"{first}-{second}" if second == first + 1 else f"{first},{second}"
    assert f"allowed CPUs changed: CPU {first} instead of CPUs {was}; moving workers" in running.log
    # Wherever the connections come in.
    with_each = set()
    for cpu in CPUS:
        os.sched_setaffinity(0, {cpu})
        with_each |= {http_get("127.0.0.1", 8080)[1]["cpu"] for _ in range(8)}
    os.sched_setaffinity(0, CPUS)
    assert with_each == {first}

    cpuset.allow(second)  # none of those before
    assert running.ask("reload")["generation"] == 2
    assert cpus_of(running) == [[second]] * 2
    cpuset.allow(first, second)
    running.ask("restart", slot=ready(running)[0]["slot"])
    assert cpus_of(running) == every
    assert "Invalid argument" not in running.log
    assert "Traceback" not in running.log
    running.stop()


@pytest.mark.needs("root")
def test_what_is_refused_is_done_without(
    netns: object, environment: dict[str, str], home: Path
) -> None:
    numbers = NUMBERS.get(platform.machine())
    if numbers is None:
        do_without(f"needs to know the numbers of system calls on {platform.machine()}")
    refusing = python(REFUSES, ",".join(map(str, numbers)))
    command = (*refusing, STEER, "run", "--policy", "cpu", "-w", "2", "--name", "test")
    process = launch(command, environment=environment, home=home, records=home)
    running = Service(process, "test", home, home, environment)
    try:
        running.wait_ready()
        refused = f"worker 1: run on CPU {CPUS[1 % len(CPUS)]}: Operation not permitted; it does"
        assert refused in running.log
        assert running.ask("reload")["generation"] == 2
        niced = "leave the CPUs to others until it is ready: Operation not permitted"
        assert niced in running.log
        assert "Traceback" not in running.log
        assert http_get("127.0.0.1", 8080)[1]["generation"] == 2
    finally:
        running.clean_up()
