"""A worker's sockets that a program it started still has open when it has ended."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from steer.config import address
from steer.linux import processes
from steer.sockets import leaked, listeners, reuseport
from steer.sockets.listeners import Borrower
from testkit.clients import answer, request, udp_ask
from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.namespaces import Netns
from testkit.processes import eventually, is_running, line_of, python, running
from testkit.programs import source
from testkit.service import Service

pytestmark = pytest.mark.needs("netns", "pidfd_getfd")
BIND = ("-b", f"127.0.0.1:{PORT}")
APP = source("has_started_another")
backends = pytest.mark.parametrize(
    "backend",
    [pytest.param("ebpf", marks=pytest.mark.needs("bpf", "migrate")), "cbpf", "kernel"],
)


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


def start(service: StartService, home: Path, backend: str) -> Service:
    policy = "kernel" if backend == "kernel" else "hash"
    arguments = ("--policy", policy, "--backend", backend, "-w", "2", "--hang-timeout=0")
    running = service(*BIND, *arguments, "--graceful-timeout=1", "app:call")
    eventually(lambda: len(helpers(home)), 2)
    return running


def helpers(home: Path) -> list[int]:
    path = home / "helpers"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def named(running: Service) -> set[int]:
    """Those that the log says to have had a socket."""
    return {int(pid) for pid in re.findall(r"pid (\d+)\) still has its socket", running.log)}


def all_are_answered(running: Service) -> None:
    now = {each["pid"] for each in running.workers()}
    waiting = [request() for _ in range(40)]
    assert {answer(each)["pid"] for each in waiting} <= now


@backends
def test_after_a_reload_nothing_waits_at_what_a_helper_has_open(
    service: StartService, home: Path, backend: str
) -> None:
    running = start(service, home, backend)
    old = set(helpers(home))
    assert running.steer("reload").returncode == 0
    eventually(lambda: named(running) >= old)
    all_are_answered(running)


@backends
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_after_a_reload_no_datagram_goes_to_what_a_helper_has_open(
    service: StartService, home: Path, host: str, backend: str
) -> None:
    policy = "kernel" if backend == "kernel" else "hash"
    options = ("--policy", policy, "--backend", backend, "-w", "2", "--hang-timeout=0")
    at = f"udp://{host}:{PORT}"
    running = service("-b", at, *options, "--graceful-timeout=3", "app:datagrams")
    eventually(lambda: len(helpers(home)), 2)
    old = set(helpers(home))
    assert running.steer("reload").returncode == 0
    eventually(lambda: named(running) >= old)
    eventually(lambda: running.log.count("and is cut off from it"), 2)
    now = {each["pid"] for each in running.workers() if each["state"] == "ready"}
    assert {udp_ask("127.0.0.1", PORT)["pid"] for _ in range(40)} == now


@backends
def test_after_a_crash_nothing_waits_at_what_a_helper_has_open(
    service: StartService, home: Path, backend: str
) -> None:
    running = start(service, home, backend)
    before = set(helpers(home))
    crashed = running.workers()[0]["pid"]
    os.kill(crashed, signal.SIGKILL)
    eventually(lambda: len(named(running) & before), 1)
    eventually(lambda: len(helpers(home)), 3)
    running.wait_ready()
    all_are_answered(running)
    (helper,) = named(running)
    eventually(lambda: not is_running(helper))


def test_a_crowd_of_helpers_does_not_fill_the_log(service: StartService) -> None:
    options = ("--policy=hash", "--backend=cbpf", "-w", "2", "--graceful-timeout=0.3")
    running = service(*BIND, *options, "app:crowd")
    os.kill(running.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: "worker 0 has ended, and 8 more have a socket of it" in running.log)
    assert len(named(running)) == 4


def test_after_a_stop_the_port_is_free(service: StartService, home: Path) -> None:
    running = start(service, home, "kernel")
    assert running.steer("stop", "--quick").returncode == 0
    assert not any(is_running(each) for each in helpers(home))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", PORT))


def test_process_of_somebody_else_that_was_sent_a_listener_is_named(
    service: StartService, home: Path
) -> None:
    """Which is no process of the worker."""
    running = service(*BIND, "--policy=hash", "--backend=auto", "-w", "2")
    worker = running.workers()[0]
    with _taken(worker["pid"], worker["sockets"][0]):
        os.kill(worker["pid"], signal.SIGKILL)
        eventually(lambda: named(running), {os.getpid()})
        running.wait_ready()
        all_are_answered(running)


def test_who_refuses_to_lend_a_listener_is_not_the_only_one_asked(
    monkeypatch: pytest.MonkeyPatch, netns: Netns
) -> None:
    """As with yama(8), where who descends from us may be borrowed from, and others not."""
    sleeps = python("import time; print(flush=True); time.sleep(600)")
    refusing = set[int]()

    def lend(pid: int, fd: int) -> int:
        if pid in refusing:
            raise PermissionError(errno.EPERM, "refused")
        return borrowed(pid, fd)

    borrowed = listeners.pidfd_getfd
    monkeypatch.setattr(listeners, "pidfd_getfd", lend)
    bind = address.parse(f"127.0.0.1:{PORT}")
    listener = reuseport.member(bind, 16)
    inode, fd = processes.socket_inode(listener.fileno()), listener.fileno()
    with running(*sleeps, fds=[fd]) as first, running(*sleeps, fds=[fd]) as second:
        for each in (first, second):
            line_of(each)
        known = leaked.find([bind], [inode], [first.pid], everywhere=False)
        assert [leak.pid for leak in known] == [first.pid]
        refusing.update((first.pid, os.getpid()))
        told = {leak.pid: refusal for leak, refusal in leaked.shut_down(known)}
        assert told == dict.fromkeys((first.pid, second.pid, os.getpid()), "")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", PORT))
        refusing.add(second.pid)
        listener.listen()
        refused = {leak.pid: refusal for leak, refusal in leaked.shut_down(known)}
        assert refused.keys() == told.keys()
        assert all("EPERM" in refusal for refusal in refused.values())
    listener.close()


def _taken(pid: int, inode: int) -> socket.socket:
    """A duplicate of another process's socket, in this one."""
    with Borrower(pid, frozenset({inode})).borrow() as lent:
        return lent[inode].dup()
