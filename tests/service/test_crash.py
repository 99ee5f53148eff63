"""Workers that die: what waits for them is answered by others, and they are started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from steer.linux import processes
from testkit.clients import answer, freeze, is_answered, queue, request
from testkit.fixtures import StartService
from testkit.namespaces import Netns
from testkit.processes import eventually, is_running, tcp_count
from testkit.programs import source
from testkit.service import Service

pytestmark = pytest.mark.needs("netns")
MANY = 17
"""One more than the backlog, which is what fits."""
BACKLOG = str(MANY - 1)
APP = source("crashes")
COMMANDS = {
    "demo": (),
    "callable": ("app:accepts",),
    "uvicorn": ("--", sys.executable, "-m", "uvicorn", "app:answers", "--fd", "{fd}",
                "--lifespan", "off"),
    "gunicorn": ("--", sys.executable, "-m", "gunicorn", "-w", "1", "app:says"),
}  # fmt: skip
every_command = pytest.mark.parametrize(
    "command",
    [
        pytest.param(words, id=name, marks=pytest.mark.needs(*({name} & {"uvicorn", "gunicorn"})))
        for name, words in COMMANDS.items()
    ],
)
ebpf = pytest.mark.needs("bpf", "migrate")


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


# Workers and clients


def answered_by(waiting: list[socket.socket]) -> set[int]:
    return {answer(sock)["pid"] for sock in waiting}


def kill(*workers: dict[str, Any]) -> None:
    """All at once: no process of theirs is there any more to take anything."""
    for pid in [pid for worker in workers for pid in processes.descendants(worker["pid"])]:
        os.kill(pid, signal.SIGKILL)


def gone(*workers: dict[str, Any]) -> bool:
    return not any(is_running(worker["pid"]) for worker in workers)


def queued(running: Service) -> dict[int, int]:
    """By slot, as the kernel has it."""
    (service,) = json.loads(running.steer("status", running.name, "--json").stdout)["services"]
    return {each["slot"]: each["connections"]["queued"] for each in service["workers"]}


def migrated(running: Service) -> int:
    found: int = running.status()["totals"]["migrated"]
    return found


# One of several


def crash_with_queue(running: Service, clients: ExitStack) -> tuple[list[socket.socket], int]:
    """Kill one with connections in its queue; these, and its process id."""
    dead = running.workers()[1]
    freeze(dead)
    waiting = queue(running, clients, MANY, dead)
    assert queued(running)[dead["slot"]] == MANY
    kill(dead)
    return waiting, dead["pid"]


@ebpf
@pytest.mark.parametrize("policy", ["cpu", "hash", "round-robin", "random"])
def test_what_waits_for_one_that_is_killed_is_answered_by_others(
    service: StartService, clients: ExitStack, policy: str
) -> None:
    running = service("--policy", policy, "-w", "4", "--backlog", BACKLOG, "--hang-timeout=0")
    before = {each["pid"] for each in running.workers()}

    waiting, dead = crash_with_queue(running, clients)

    assert dead not in answered_by(waiting)
    assert migrated(running) == MANY
    assert running.status()["totals"]["unsteered"] == 0
    running.wait_ready()
    (fresh,) = {each["pid"] for each in running.workers()} - before
    assert dead != fresh


@ebpf
@every_command
def test_whatever_the_server(
    service: StartService, clients: ExitStack, command: tuple[str, ...]
) -> None:
    options = ("--policy=hash", "-w", "3", "--backlog", BACKLOG, "--hang-timeout=0")
    running = service(*options, *command)
    waiting, dead = crash_with_queue(running, clients)
    assert dead not in answered_by(waiting)
    assert migrated(running) == MANY


@ebpf
def test_crash_after_crash(service: StartService, clients: ExitStack) -> None:
    """What was moved to one that is killed too moves again."""
    running = service("app:accepts", "--policy=hash", "-w", "3", "--hang-timeout=0")
    first, second, third = running.workers()
    freeze(first)
    freeze(second)
    waiting = queue(running, clients, 10, first, second)
    for each in (first, second):
        kill(each)
        eventually(lambda each=each: gone(each))
    running.wait_ready()
    assert {first["pid"], second["pid"]}.isdisjoint(answered_by(waiting))
    assert migrated(running) >= 10
    assert third["pid"] in {each["pid"] for each in running.workers()}


@ebpf
def test_no_duplicate_of_a_listener_stays_behind(service: StartService, clients: ExitStack) -> None:
    """One that is kept goes on listening, and being chosen, after its worker has died."""
    running = service("--policy=hash", "-w", "3", "--hang-timeout=0.2", "--hang=skip",
                      "--graceful-timeout=0")  # fmt: skip
    dead = running.workers()[1]
    freeze(dead)
    waiting = queue(running, clients, 3, dead)
    answered_by(waiting)  # it was looked at, and its queue moved
    workers = running.workers()
    guard = set(processes.descendants(running.pid)) - {
        running.pid,
        *(each["pid"] for each in workers),
    }
    theirs = {inode for each in workers for inode in each["sockets"]}
    assert len(guard) == 1
    assert len(theirs) == 3
    for pid in (running.pid, *guard):
        mine = {inode for _, inode in processes.sockets_by_fd(pid)}
        eventually(lambda mine=mine: mine.isdisjoint(theirs))


# All of them


@ebpf
@pytest.mark.parametrize("policy", ["cpu", "hash", "round-robin", "random"])
def test_all_killed_at_once(
    service: StartService, home: Path, clients: ExitStack, policy: str
) -> None:
    """Connections wait while nobody is there: those that waited before, and new ones.

    But for those that the kernel moves to a listener which is closed in the same instant: it
    resets and counts them, see inet_csk_listen_stop() in net/ipv4/inet_connection_sock.c.
    """
    running = service("app:breaks", "--policy", policy, "-w", "3", "--hang-timeout=0")
    workers = running.workers()
    for each in workers:
        freeze(each)
    waiting = queue(running, clients, 12, *workers)
    (home / "broken").touch()
    kill(*workers)
    eventually(lambda: gone(*workers))
    waiting += [clients.enter_context(request()) for _ in range(5)]
    eventually(lambda: {each["state"] for each in running.workers()}, {"backoff"})
    waiting += [clients.enter_context(request()) for _ in range(5)]
    cut_off = [sock for sock in waiting if is_answered(sock)]
    assert len(cut_off) == tcp_count("TCPMigrateReqFailure")
    for sock in cut_off:
        with pytest.raises(ConnectionResetError):
            answer(sock)

    (home / "broken").unlink()

    pids = answered_by([sock for sock in waiting if sock not in cut_off])
    running.wait_ready()
    assert pids <= {each["pid"] for each in running.workers()}
    assert migrated(running) >= 22


@ebpf
def test_the_only_one(service: StartService, clients: ExitStack) -> None:
    """Again and again: nobody notices but by the time it takes."""
    running = service("-w", "1", "--hang-timeout=0")
    for _ in range(3):
        (only,) = running.workers()
        freeze(only)
        waiting = queue(running, clients, 4, only)
        kill(only)
        assert only["pid"] not in answered_by(waiting)
        running.wait_ready()


# What cannot be moved


@pytest.mark.parametrize("backend", ["cbpf", "kernel"])
def test_without_ebpf_the_kernel_may_be_told_to_migrate(
    service: StartService, netns: Netns, clients: ExitStack, backend: str
) -> None:
    netns.sysctl("net.ipv4.tcp_migrate_req", 1)
    running, waiting, dead = crash_uncounted(service, clients, backend)
    assert dead not in answered_by(waiting)
    assert not any("lost" in note for note in running.status()["notes"])


@pytest.mark.parametrize("backend", ["cbpf", "kernel"])
def test_without_ebpf_what_waits_is_lost_and_notes_say_so(
    service: StartService, netns: Netns, clients: ExitStack, backend: str
) -> None:
    netns.sysctl("net.ipv4.tcp_migrate_req", 0)
    running, waiting, _ = crash_uncounted(service, clients, backend)
    for sock in waiting:
        with pytest.raises(ConnectionResetError):
            answer(sock)
    assert any("lost" in note for note in running.status()["notes"])
    with clients.enter_context(request()) as sock:
        assert answer(sock)


def crash_uncounted(
    service: StartService, clients: ExitStack, backend: str
) -> tuple[Service, list[socket.socket], int]:
    """Kill one with connections in its queue, where nobody counts who is chosen."""
    running = service("--backend", backend, "--policy=hash", "-w", "2", "--hang-timeout=0")
    dead = running.workers()[1]
    freeze(dead)
    socks = [clients.enter_context(request()) for _ in range(40)]
    there = eventually(lambda: queued(running)[dead["slot"]])
    eventually(lambda: sum(map(is_answered, socks)), len(socks) - there)
    waiting = [sock for sock in socks if not is_answered(sock)]
    kill(dead)
    eventually(lambda: gone(dead))
    return running, waiting, dead["pid"]


# Again and again


def waited_s(running: Service) -> list[float]:
    """How long was waited before each start of another, as the log has it."""
    return [float(each) for each in re.findall(r"another in (\S+) s", running.log)]


@ebpf
def test_one_that_is_never_ready_is_tried_less_and_less_often(
    service: StartService, home: Path
) -> None:
    running = service("app:breaks", "-w", "2", "--policy=hash")
    (home / "broken").touch()
    kill(running.workers()[0])
    eventually(lambda: len(waited_s(running)) >= 4)
    assert waited_s(running)[:4] == [0.25, 0.5, 1, 2]
    looping = eventually(lambda: next(e for e in running.workers() if e["state"] == "backoff"))
    assert looping["pid"] is None
    assert looping["restarts"] >= 4
    shown = running.steer("status", running.name).stdout
    assert "backoff" in shown


@ebpf
def test_one_that_was_ready_is_never_missed_for_long(service: StartService) -> None:
    running = service("app:accepts", "-w", "2", "--policy=hash")
    for times in range(1, 6):
        kill(running.workers()[0])
        eventually(lambda times=times: running.log.count("killed by"), times)
        running.wait_ready()
    assert waited_s(running) == [0.25, 0.5, 1, 1]


@ebpf
def test_one_that_exits_without_a_fault(service: StartService, clients: ExitStack) -> None:
    """It was not told to: another takes its place all the same."""
    running = service("app:accepts", "-w", "1")
    (before,) = running.workers()
    assert answer(request("/exit"))["pid"] == before["pid"]
    assert answer(request())["pid"] != before["pid"]
    running.wait_ready()
    assert "exit status 0" in running.log
    assert running.workers()[0]["restarts"] == 1


@ebpf
def test_one_that_says_that_it_stops_gets_nothing_new(service: StartService) -> None:
    running = service("app:accepts", "-w", "3", "--policy=round-robin")
    stopping = answer(request("/stopping"))
    state: Callable[[], str] = lambda: next(  # noqa: E731
        each["state"] for each in running.workers() if each["pid"] == stopping["pid"]
    )
    eventually(state, "draining")
    assert stopping["pid"] not in {answer(request())["pid"] for _ in range(12)}
    os.kill(stopping["pid"], signal.SIGKILL)
    running.wait_ready(3)
    assert len({answer(request())["pid"] for _ in range(12)}) == 3


@ebpf
def test_all_say_that_they_stop(service: StartService, clients: ExitStack) -> None:
    """Connections wait for the next."""
    running = service("app:accepts", "-w", "1")
    stopping = answer(request("/stopping"))
    eventually(lambda: running.workers()[0]["state"], "draining")
    waiting = clients.enter_context(request())
    eventually(lambda: queued(running)[stopping["slot"]], 0)
    assert not is_answered(waiting)
    os.kill(stopping["pid"], signal.SIGKILL)
    assert answer(waiting)["pid"] != stopping["pid"]
