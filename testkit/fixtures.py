"""Fixtures: a network namespace, a home, services and commands in them."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Protocol

import pytest

from testkit.capabilities import do_without, require
from testkit.namespaces import Netns, network_namespace
from testkit.processes import eventually
from testkit.service import Service, clean_environment, run_steer, start_service


@pytest.fixture
def netns() -> Iterator[Netns]:
    """The test, and what it starts, in a network namespace of its own; see `namespaces`."""
    require("netns")
    with network_namespace() as made:
        yield made


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    """For sockets that are to be closed when the test ends."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def datagrams() -> Iterator[socket.socket]:
    """A socket that takes them, over IPv6."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        made.bind(("::1", 0))
        yield made


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory for services: short enough for a socket's path, and for any user to reach."""
    with tempfile.TemporaryDirectory(prefix="steer-test-") as name:
        home = Path(name)
        for directory in (home, home / "run", home / "cache"):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o777)
        yield home


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    """Of the services and commands a test starts; the test may add to it before it does."""
    return clean_environment(home)


class RunSteer(Protocol):
    def __call__(
        self, *arguments: str, user: int | None = None
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def steer(netns: Netns, home: Path, environment: dict[str, str]) -> RunSteer:
    """Run a `steer` command to its end, in the test's namespace."""

    def run(*arguments: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
        return run_steer(*arguments, environment=environment, cwd=home, user=user)

    return run


class StartService(Protocol):
    def __call__(
        self,
        *arguments: str,
        name: str = "test",
        ready: bool = True,
        user: int | None = None,
        under: Sequence[str] = (),
    ) -> Service: ...


@pytest.fixture
def service(netns: Netns, home: Path, environment: dict[str, str]) -> Iterator[StartService]:
    """Start `steer run ARGUMENTS` in the test's namespace; wait until all workers are ready.

    At the end it is stopped, and the test fails if it leaves anything: a process, a
    program or map, a control socket.

    Args:
        name: of the service.
        ready: False returns at once, for services that are not to come up.
        user: uid to run it as, see `confine.NOBODY`; needs "nobody".
        under: a command that executes steer in its own place.
    """
    started: list[Service] = []

    def start(
        *arguments: str,
        name: str = "test",
        ready: bool = True,
        user: int | None = None,
        under: Sequence[str] = (),
    ) -> Service:
        if user is not None:
            require("nobody")
        one = start_service(
            *arguments, name=name, environment=environment, home=home, user=user, under=under
        )
        started.append(one)
        return one.wait_ready() if ready else one

    yield start
    errors = []
    # All are ended before any is looked at: two may have wanted the same name.
    for step, one in product((Service.end, Service.clean_up), reversed(started)):
        try:
            step(one)
        except Exception as error:  # noqa: BLE001 - the others have to be ended too
            errors.append(error)
    if errors:
        raise ExceptionGroup("services were not left in order", errors)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """One of version 2, of our own."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    roots = [mount[4] for mount in mounts if mount[mount.index("-") + 1] == "cgroup2"]
    made = Path(roots[0] if roots else "/nowhere", f"steer-test-{os.getpid()}")
    try:
        made.mkdir()
    except OSError as error:
        do_without(f"needs a cgroup: {error}")
    yield made
    (made / "cgroup.freeze").write_text("0")
    (made.parent / "cgroup.procs").write_text(str(os.getpid()))
    eventually(lambda: (made / "cgroup.procs").read_text() == "")
    made.rmdir()
