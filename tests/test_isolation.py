"""A worker is not trusted: what it has of its controller, and what it can get hold of."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import StartService
from support import DEADLINE_S, NOBODY, Service, eventually, is_running

from steer.kernel import proc

PORT = 8080
APP = '''
"""Answers every connection with what it could get hold of, as JSON."""
import ctypes, errno, json, os, socket, sys

CONTROLLER = {"pid": 0}

def refused(act):
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def bpf(command, attribute):
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321}.get(os.uname().machine, 280)
    data = ctypes.create_string_buffer(attribute, 128)
    if libc.syscall(number, command, data, len(data)) < 0:
        raise OSError(ctypes.get_errno(), "bpf")

def attempts(controller, map_id):
    a_map = int(map_id).to_bytes(4, sys.byteorder)
    stolen = ctypes.CDLL(None, use_errno=True)
    def steal():
        pidfd = os.pidfd_open(controller)
        if stolen.syscall(438, pidfd, 3, 0) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return {
        "map by its id": refused(lambda: bpf(14, a_map)),
        "memory": refused(lambda: open(f"/proc/{controller}/mem", "r+b").close()),
        "descriptors": refused(lambda: os.listdir(f"/proc/{controller}/fd")),
        "one descriptor": refused(steal),
    }

def serve(listener):
    while True:
        client, _ = listener.accept()
        with client:
            asked = client.recv(100).decode().split()
            client.sendall(json.dumps(attempts(int(asked[0]), int(asked[1]))).encode())

def call(worker):
    serve(worker.sockets[0])

if __name__ == "__main__":
    serve(socket.socket(fileno=3))
'''


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


def shared_and_writable(pid: int) -> list[str]:
    """Mappings through which a process could change what others see."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [line.split(maxsplit=5) for line in lines]
    return [each[-1] for each in found if each[1][1] == "w" and each[1][3] == "s"]


def bpf_descriptors(pid: int) -> list[str]:
    fds = Path(f"/proc/{pid}/fd")
    names = [os.readlink(each) for each in fds.iterdir()]
    return [name for name in names if "bpf" in name]


def descriptors(pid: int) -> dict[int, str]:
    return {int(each.name): os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}


def own_descriptors(worker: dict[str, Any]) -> set[str]:
    """Of a worker, but for standard input, output and error."""
    return {name for fd, name in descriptors(worker["pid"]).items() if fd > 2}


def has_only_its_own(running: Service, worker: dict[str, Any]) -> None:
    assert shared_and_writable(worker["pid"]) == []
    assert own_descriptors(worker) == {f"socket:[{inode}]" for inode in worker["sockets"]}
    stderr = descriptors(worker["pid"])[2]
    assert stderr.startswith("pipe:")
    assert stderr in descriptors(running.pid).values()


@pytest.mark.needs("bpf", "root")
@pytest.mark.parametrize("way", ["callable", "command"])
def test_worker_has_nothing_of_the_controllers(service: StartService, home: Path, way: str) -> None:
    """Neither at the start, nor one that the loop starts later, nor after an adoption."""
    command = ("--", sys.executable, "app.py")
    what = command if way == "command" else ("app:call",)
    arguments = ("-w", "2", "--policy", "least-conn", "-b", f"127.0.0.1:{PORT}", *what)
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
    family = proc.descendants(running.pid)
    return [pid for pid in family if pid not in workers and pid != running.pid and is_running(pid)]


@pytest.mark.needs("bpf", "nobody")
@pytest.mark.parametrize("way", ["callable", "command"])
def test_worker_of_another_user_reaches_no_map(service: StartService, way: str) -> None:
    command = ("--", sys.executable, "app.py")
    what = command if way == "command" else ("app:call",)
    running = service("-w", "1", "-u", str(NOBODY), "-b", f"127.0.0.1:{PORT}", *what)
    (number, *_) = (number for kind, number in running._bpf if kind == "map")
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        sock.sendall(f"{running.pid} {number}".encode())
        with sock.makefile("rb") as stream:
            found = json.loads(stream.read())
    assert found == {
        "map by its id": "EPERM",
        "memory": "EACCES",
        "descriptors": "EACCES",
        "one descriptor": "EPERM",
    }
