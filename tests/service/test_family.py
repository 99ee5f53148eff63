"""Processes of a worker that have left its process group: found, told to end, and reaped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from steer.linux import processes
from steer.loader import compile
from testkit.clients import http_get, is_port_free
from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.processes import DEADLINE_S, eventually, is_running, stopped
from testkit.programs import path, source
from testkit.service import Service

pytestmark = pytest.mark.needs("netns")
BIND = ("-b", f"127.0.0.1:{PORT}")
SERVER = source("leaves_a_daemon")
SERVE = (sys.executable, "server.py")


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "server.py").write_text(SERVER)


def pids_in(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def server_pid() -> int:
    """Of the process that serves, which is not the worker's first."""
    found: int = http_get("127.0.0.1", PORT)[1]["pid"]
    return found


WRAPPERS = {
    "setsid": ("setsid", "-w"),
    "tini": ("tini", "--"),
    "dumb-init": ("dumb-init",),
}


@pytest.mark.parametrize(
    "wrapper", [pytest.param(name, marks=pytest.mark.needs(name)) for name in WRAPPERS]
)
def test_server_in_a_session_of_its_own_ends_with_its_worker(
    service: StartService, home: Path, wrapper: str
) -> None:
    """After a stop, and after what was its parent was killed."""
    one = service(*BIND, "-w", "1", "--", *WRAPPERS[wrapper], *SERVE)
    first, server = one.workers()[0]["pid"], server_pid()
    assert server != first
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not is_running(server))
    eventually(lambda: server in pids_in(home / "told"))
    one.wait_ready()

    server = server_pid()
    assert one.steer("stop").returncode == 0
    assert not is_running(server)
    assert server in pids_in(home / "told")
    assert is_port_free()


@pytest.mark.needs("setsid")
def test_without_a_controller_the_guard_ends_all_of_a_worker(
    service: StartService, home: Path
) -> None:
    one = service(*BIND, "-w", "2", "--", *WRAPPERS["setsid"], *SERVE)
    server = server_pid()
    one.send_signal(signal.SIGKILL)
    one.wait()
    assert one.steer("stop").returncode == 0
    assert not is_running(server)
    assert server in pids_in(home / "told")
    assert is_port_free()


@pytest.mark.parametrize("end", ["stop", "restart", "crash", "adopted"])
def test_daemon_of_a_worker_ends_with_it(service: StartService, home: Path, end: str) -> None:
    """It has another session, no parent, and nothing in its environment."""
    arguments = (*BIND, "-w", "1", "server:call")
    one = service(*arguments)
    (helper,) = eventually(lambda: pids_in(home / "helpers"))
    if end == "adopted":
        one.send_signal(signal.SIGKILL)
        one.wait()
        one = service(*arguments)
    if end == "crash":
        os.kill(one.workers()[0]["pid"], signal.SIGKILL)
    elif end == "restart":
        assert one.steer("restart", "0").returncode == 0
    else:
        assert one.steer("stop").returncode == 0
    eventually(lambda: not is_running(helper))
    assert helper in pids_in(home / "told")


MANY = 20
"""More than one step sees to."""


def end_all(service: StartService, one: Service, arguments: tuple[str, ...], end: str) -> None:
    """All workers of a service at the same moment."""
    if end.startswith("adopted"):
        one.send_signal(signal.SIGKILL)
        one.wait()
        one = service(*arguments)
    if end == "reload":
        assert one.steer("reload").returncode == 0
    elif end.endswith("crash"):
        before = one.workers()
        with stopped(one.pid):
            for worker in before:
                os.kill(worker["pid"], signal.SIGKILL)
        eventually(lambda: all(each["restarts"] for each in one.workers()))
    else:
        assert one.steer("stop").returncode == 0


@pytest.mark.parametrize("end", ["stop", "reload", "crash", "adopted stop", "adopted crash"])
def test_daemons_of_all_that_end_at_once_end_with_them(
    service: StartService, home: Path, end: str
) -> None:
    arguments = (*BIND, "-w", str(MANY), "server:call")
    one = service(*arguments)
    eventually(lambda: len(pids_in(home / "helpers")), MANY)
    first = pids_in(home / "helpers")
    end_all(service, one, arguments, end)
    eventually(lambda: not any(map(is_running, first)))
    assert set(first) <= set(pids_in(home / "told"))


@pytest.mark.parametrize("end", ["stop", "reload", "adopted stop"])
def test_daemons_that_do_not_end_are_killed_with_all_that_are(
    service: StartService, home: Path, end: str
) -> None:
    arguments = (*BIND, "-w", str(MANY), "--graceful-timeout=1", "server:call_stubborn")
    one = service(*arguments)
    eventually(lambda: len(pids_in(home / "helpers")), MANY)
    first = pids_in(home / "helpers")
    end_all(service, one, arguments, end)
    eventually(lambda: not any(map(is_running, first)))


@pytest.mark.needs("setsid")
@pytest.mark.parametrize("way", ["stop", "guard"])
def test_servers_below_wrappers_that_end_at_once_are_told_each(
    service: StartService, home: Path, way: str
) -> None:
    """setsid(1) passes no signal on: what it started is told once it has ended."""
    one = service(*BIND, "-w", str(MANY), "--", *WRAPPERS["setsid"], *SERVE)
    servers = [child for each in one.workers() for child in processes.children(each["pid"])]
    assert len(servers) == MANY
    if way == "guard":
        one.send_signal(signal.SIGKILL)
        one.wait()
    assert one.steer("stop").returncode == 0
    assert not any(map(is_running, servers))
    assert sorted(pids_in(home / "told")) == sorted(servers)
    assert is_port_free()


def zombies(pid: int) -> list[int]:
    """Children of a process that have ended and were not waited for."""
    return [child for child in processes.children(pid) if not processes.is_alive(child)]


@pytest.mark.parametrize("way", ["subreaper", "first process"])
def test_what_a_worker_leaves_to_nobody_is_reaped(
    service: StartService, home: Path, way: str
) -> None:
    under = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    one = service(*BIND, "-w", "3", "server:orphans", under=under if way != "subreaper" else ())
    controller = one.pid if way == "subreaper" else processes.children(one.pid)[0]
    eventually(lambda: zombies(controller), [])
    assert len(processes.children(controller)) == 4, "three workers and the guard"
    assert one.steer("stop").returncode == 0
    assert one.wait() == 0


CONTROLLERS = {
    "subreaper": (),
    "first process": ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
}


@pytest.mark.needs("setsid")
@pytest.mark.parametrize("under", CONTROLLERS.values(), ids=CONTROLLERS)
def test_children_from_before_steer_are_reaped_and_else_left_alone(
    service: StartService, home: Path, under: tuple[str, ...]
) -> None:
    """As a container's script leaves them: in steer's process group, and in another session;
    and what they leave behind themselves."""
    (home / "start.sh").write_text(
        'cat fifo &\n(cat fifo & exec sleep 3600) &\nsetsid sleep 3600 &\nexec "$@"\n'
    )
    os.mkfifo(home / "fifo")
    one = service(*BIND, "-w", "2", under=(*under, "sh", "start.sh"))
    controller = processes.children(one.pid)[0] if under else one.pid
    first = set(processes.children(controller))
    (parent,) = [
        pid for pid in first if processes.arguments(pid)[0] == "sleep" and processes.children(pid)
    ]
    (stays,) = [pid for pid in first - {parent} if processes.arguments(pid)[0] == "sleep"]
    left = processes.children(parent)
    try:
        os.kill(parent, signal.SIGKILL)
        eventually(lambda: set(processes.children(controller)), {*first, *left} - {parent})
        (home / "fifo").write_text("")
        eventually(lambda: len(processes.children(controller)), len(first) - 2)
        assert not zombies(controller)
        assert one.steer("stop").returncode == 0
        assert one.wait() == 0
        assert is_running(stays) is not bool(under)
    finally:
        with suppress(ProcessLookupError):
            os.kill(stays, signal.SIGKILL)


def test_policy_is_compiled_while_orphans_end(service: StartService, home: Path) -> None:
    """The compiler is a child of the controller, too, and its exit status is not to be lost."""
    one = service(*BIND, "-w", "1", "server:forks_on")
    (home / "mine.c").write_text((compile.sources() / "hash.c").read_text())
    assert one.steer("policy", "./mine.c").returncode == 0
    eventually(lambda: zombies(one.pid), [])


def test_orphans_are_told_from_children_that_somebody_waits_for() -> None:
    """In a process of its own, which becomes a subreaper for good."""
    command = [sys.executable, path("tells_orphans")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout.split() == ["True", "True", "True", "7", "0"], done.stderr
