"""A worker is not trusted: what it has of its controller, and what it can get hold of."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steer.linux import processes
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, channel_of, descriptors, eventually, is_running
from testkit.programs import source
from testkit.service import STEER, Service, launch

PORT = 8080
WAYS = {"callable": ("app:call",), "command": ("--", sys.executable, "app.py")}
APP = source("tells_what_it_has")


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


def ask(words: str, port: int = PORT) -> dict[str, str]:
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
        sock.sendall(words.encode())
        with sock.makefile("rb") as stream:
            found: dict[str, str] = json.loads(stream.read())
            return found


def shared_and_writable(pid: int) -> list[str]:
    """Mappings through which a process could change what others see."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [line.split(maxsplit=5) for line in lines]
    return [each[-1] for each in found if each[1][1] == "w" and each[1][3] == "s"]


def bpf_descriptors(pid: int) -> list[str]:
    return [name for name in descriptors(pid).values() if "bpf" in name]


def own_descriptors(worker: dict[str, Any]) -> set[str]:
    """Of a worker, but for standard input, output and error."""
    return {name for fd, name in descriptors(worker["pid"]).items() if fd > 2}


def has_only_its_own(running: Service, worker: dict[str, Any]) -> None:
    """Its listeners, and the channel that tells it when nobody looks after it any more."""
    assert shared_and_writable(worker["pid"]) == []
    listeners = {f"socket:[{inode}]" for inode in worker["sockets"]}
    assert own_descriptors(worker) == {*listeners, channel_of(worker["pid"])}
    stderr = descriptors(worker["pid"])[2]
    assert stderr.startswith("pipe:")
    assert stderr in descriptors(running.pid).values()


@pytest.mark.needs("bpf", "root")
@pytest.mark.parametrize("way", WAYS)
def test_worker_has_nothing_of_the_controllers(service: StartService, home: Path, way: str) -> None:
    """Neither at the start, nor one that the loop starts later, nor after an adoption."""
    arguments = ("-w", "2", "--policy", "least-conn", "-b", f"127.0.0.1:{PORT}", *WAYS[way])
    running = service(*arguments)
    assert bpf_descriptors(running.pid), "the controller has maps to be kept from others"
    assert shared_and_writable(running.pid)
    for worker in running.workers():
        has_only_its_own(running, worker)

    running.ask("reload")
    eventually(lambda: len(running.workers()), 2)
    for worker in running.workers():
        has_only_its_own(running, worker)

    running.send_signal(signal.SIGUSR2)
    eventually(lambda: "adopted 2 workers" in running.log)
    running.wait_ready()
    assert shared_and_writable(running.pid)
    running.ask("restart", slot=running.workers()[0]["slot"])
    eventually(lambda: len(running.workers()), 2)
    for worker in running.workers():
        has_only_its_own(running, worker)


@pytest.mark.needs("bpf", "root")
def test_guard_maps_nothing_of_the_controllers(service: StartService) -> None:
    """It keeps descriptors for the next controller; it reads and writes no map."""
    running = service("-w", "1", "--policy", "least-conn")
    (guard,) = guards(running)
    assert bpf_descriptors(guard)
    assert shared_and_writable(guard) == []
    os.kill(guard, signal.SIGKILL)
    eventually(lambda: [each for each in guards(running) if each != guard])
    assert shared_and_writable(guards(running)[0]) == []


def guards(running: Service) -> list[int]:
    workers = [each["pid"] for each in running.workers()]
    family = processes.descendants(running.pid)
    return [pid for pid in family if pid not in workers and pid != running.pid and is_running(pid)]


@pytest.mark.needs("bpf", "nobody")
@pytest.mark.parametrize("way", WAYS)
def test_worker_of_another_user_reaches_no_map(service: StartService, way: str) -> None:
    running = service("-w", "1", "-u", str(NOBODY), "-b", f"127.0.0.1:{PORT}", *WAYS[way])
    (number, *_) = (number for kind, number in running._bpf if kind == "map")
    found = ask(f"{running.pid} {number}")
    assert found == {
        "map by its id": "EPERM",
        "memory": "EACCES",
        "descriptors": "EACCES",
        "one descriptor": "EPERM",
    }


# Capabilities

NOTHING = "0000000000000000"
_NET_BIND_SERVICE, _NET_ADMIN, _PERFMON, _BPF = 10, 12, 38, 39
POWERS = f"{(1 << _NET_BIND_SERVICE) | (1 << _NET_ADMIN) | (1 << _PERFMON) | (1 << _BPF):016x}"
AMBIENT = ("net_bind_service", "net_admin", "perfmon", "bpf")


def proc_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@contextmanager
def started_with_ambient(
    user: int, *arguments: str, environment: dict[str, str], home: Path
) -> Iterator[Service]:
    """`steer run` as that user, given capabilities as AmbientCapabilities= of systemd does."""
    given = ",".join(f"+{name}" for name in AMBIENT)
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    powers = (f"--inh-caps={given}", f"--ambient-caps={given}")
    command = (*become, *powers, STEER, "run", "--name", "test", "-w", "1", *arguments)
    process = launch(command, environment=environment, home=home, records=home)
    running = Service(process, "test", home, home, environment)
    try:
        yield running.wait_ready()
    finally:
        running.clean_up()


@pytest.mark.needs("bpf", "nobody")
@pytest.mark.parametrize("way", WAYS)
def test_worker_has_none_of_the_capabilities_steer_has(
    netns: Netns, environment: dict[str, str], home: Path, way: str
) -> None:
    """Though they are what binds its low port, and what loads the program."""
    arguments = ("-b", "127.0.0.1:80", *WAYS[way])
    with started_with_ambient(NOBODY, *arguments, environment=environment, home=home) as running:
        assert running.status()["backend"] == "ebpf"
        assert proc_status(running.pid)["CapEff"] == POWERS
        found = ask(" ", 80)
        assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {NOTHING}
        assert found["NoNewPrivs"] == "1"
        # Its sockets can still be borrowed, as they have to be for this.
        assert running.ask("restart", slot=0)["new_slot"] == 1


@pytest.mark.needs("bpf", "nobody")
@pytest.mark.parametrize("way", WAYS)
def test_keep_privileges_leaves_them(
    netns: Netns, environment: dict[str, str], home: Path, way: str
) -> None:
    arguments = ("-b", "127.0.0.1:80", "--keep-privileges", *WAYS[way])
    with started_with_ambient(NOBODY, *arguments, environment=environment, home=home):
        found = ask(" ", 80)
        assert {found[name] for name in ("CapPrm", "CapEff", "CapAmb")} == {POWERS}
        assert found["NoNewPrivs"] == "0"


@pytest.mark.needs("root", "nobody")
@pytest.mark.parametrize("way", WAYS)
def test_worker_of_another_user_can_get_none_back(service: StartService, way: str) -> None:
    running = service("-w", "1", "-u", str(NOBODY), *WAYS[way])
    found = ask(" ")
    sets = {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert sets == {NOTHING}
    assert found["NoNewPrivs"] == "1"
    assert "workers run as root" not in running.log


@pytest.mark.needs("root", "bpf")
@pytest.mark.parametrize("way", WAYS)
def test_root_stays_root_hands_nothing_on_and_is_told_once(
    netns: Netns, environment: dict[str, str], home: Path, steer: RunSteer, way: str
) -> None:
    with started_with_ambient(0, *WAYS[way], environment=environment, home=home) as running:
        assert proc_status(running.pid)["CapAmb"] == POWERS
        found = ask(" ")
        assert found["CapEff"] == proc_status(running.pid)["CapEff"] != NOTHING
        assert {found["CapInh"], found["CapAmb"]} == {NOTHING}
        assert found["NoNewPrivs"] == "0"
        running.ask("reload")
        assert running.log.count("workers run as root") == 1
    told = "note: workers run as root: set user to run them as another user"
    options = ("-w", "1", "-b", ":8081")
    assert steer("check", *options, *WAYS[way]).stdout.count(told) == 1
    for silent in (("-u", "root", *WAYS[way]), ("-u", str(NOBODY), *WAYS[way]), ()):
        assert told not in steer("check", *options, *silent).stdout


@pytest.mark.needs("root", "nobody")
def test_command_that_drops_privileges_itself_can_do_so(service: StartService) -> None:
    drop = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    service("-w", "1", "--", *drop, "--bounding-set=-all", sys.executable, "app.py")
    found = ask(" ")
    assert found["Uid"].split() == [str(NOBODY)] * 4
    assert found["CapBnd"] == NOTHING
