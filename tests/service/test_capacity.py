"""Workers at their own limit: nothing is cut, and others get what waits for them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from testkit.clients import answer, request
from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.processes import eventually, is_ready
from testkit.programs import source
from testkit.service import Service

HAPROXY = f"""
global
    maxconn 4
    nbthread 1
defaults
    mode http
    timeout client 60s
    timeout server 60s
    timeout connect 60s
frontend in
    bind fd@3
    default_backend out
backend out
    server only 127.0.0.1:{PORT + 1}
"""
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


class Backend:
    """Answers at once, but /slow only when it may."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._may = threading.Event()
        self.waiting = 0
        threading.Thread(target=self._run, daemon=True).start()

    def release(self) -> None:
        self._may.set()

    def hold(self) -> None:
        self._may.clear()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client:
            if b"/slow" in client.recv(4096):
                self.waiting += 1
                self._may.wait()
                self.waiting -= 1
            client.sendall(ANSWER)


@contextmanager
def backend() -> Iterator[Backend]:
    with socket.create_server(("127.0.0.1", PORT + 1)) as listener:
        made = Backend(listener)
        try:
            yield made
        finally:
            made.release()
            listener.shutdown(socket.SHUT_RDWR)


def is_ok(sock: socket.socket) -> bool:
    """Waits for the answer."""
    return b" 200 " in sock.recv(1000)


def full(running: Service) -> list[int]:
    return [each["slot"] for each in running.workers() if each["at_capacity"]]


def fill(running: Service, slot: int, number: int, clients: ExitStack) -> list[socket.socket]:
    """So many slow requests to one of two workers."""
    running.ask("drain", slot=1 - slot)
    made = [clients.enter_context(request("/slow")) for _ in range(number)]
    running.ask("undrain", slot=1 - slot)
    return made


@pytest.mark.needs("netns", "bpf", "migrate", "pidfd_getfd", "haproxy")
def test_haproxy_at_maxconn(service: StartService, home: Path, clients: ExitStack) -> None:
    """It stops accepting on purpose: not a connection of its is cut, however long that takes."""
    (home / "haproxy.cfg").write_text(HAPROXY)
    options = ("--policy=round-robin", "--hang-timeout=0.3", "--graceful-timeout=0.3", "-w", "2")
    with backend() as behind:
        running = service(*options, "--", "haproxy", "-db", "-q", "-f", "haproxy.cfg")
        before = [each["pid"] for each in running.workers()]
        slow = fill(running, 1, 4, clients)
        eventually(lambda: behind.waiting, 4)

        # what comes to it is answered by the other
        for _ in range(6):
            assert is_ok(clients.enter_context(request()))
        eventually(lambda: full(running), [1])
        assert {each["state"] for each in running.workers()} == {"ready"}
        assert any("at capacity: worker 1" in note for note in running.status()["notes"])
        selected = running.selected()[1]
        for _ in range(6):
            assert is_ok(clients.enter_context(request()))
        assert running.selected()[1] == selected
        assert full(running) == [1]  # for several times --hang-timeout by now

        # all are full: nothing is done
        slow += [clients.enter_context(request("/slow")) for _ in range(4)]
        eventually(lambda: behind.waiting, 8)
        slow += [clients.enter_context(request("/slow")) for _ in range(3)]
        eventually(lambda: full(running), [0, 1])
        note = "at capacity: every worker; connections wait until one accepts them"
        eventually(lambda: note in running.status()["notes"])
        assert not any(is_ready(each, 0.2) for each in slow)

        behind.release()
        assert all(map(is_ok, slow))
        eventually(lambda: full(running), [])
        assert [each["pid"] for each in running.workers()] == before
        assert "is hung" not in running.log
        for _ in range(4):
            assert is_ok(clients.enter_context(request()))
        assert all(each["restarts"] == 0 for each in running.workers())


POOL = source("thread_pool")


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
def test_an_acceptor_whose_threads_are_all_at_work(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """It takes whatever comes, and what it has taken waits for a thread."""
    os.mkfifo(home / "gate")
    options = ("--policy=round-robin", "--hang-timeout=0.3", "--graceful-timeout=0.3", "-w", "2")
    running = service(*options, "--", "/usr/bin/python3", "-Ic", POOL)
    began_s, waiting = time.monotonic(), []
    while time.monotonic() < began_s + 2:  # several times --hang-timeout
        waiting.append(clients.enter_context(request()))
        running.status()
    assert "is hung" not in running.log
    with (home / "gate").open("w"):
        assert all(map(is_ok, waiting))


# Connections that are taken for a worker, and not served by it

URING = source("accepts_by_ring")


def uring(service: StartService, home: Path, *more: str) -> Service:
    (home / "ring.py").write_text(URING)
    options = ("--policy=round-robin", "--hang-timeout=0.5", "--graceful-timeout=0.5", "-w", "2")
    return service(*options, *more, "ring:serve")


def taken_by(running: Service, target: str, clients: ExitStack) -> int:
    """The slot whose worker has this request, and then more that it does not read."""
    before = running.selected()
    clients.enter_context(request(target))
    (slot,) = (slot for slot, times in running.selected().items() if times > before[slot])
    for _ in range(6):
        clients.enter_context(request())
    eventually(lambda: running.selected()[slot] >= before[slot] + 4)
    return slot


@pytest.mark.needs("netns", "bpf", "pidfd_getfd", "io_uring")
def test_asleep_with_a_multishot_accept(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """The kernel takes connections for it, so it has no queue; it reads none, and is replaced."""
    running = uring(service, home)
    slot = taken_by(running, "/sleeps", clients)
    eventually(lambda: f"worker {slot} is hung: it serves none of the connections" in running.log)
    running.wait_ready(2)
    eventually(lambda: slot not in [each["slot"] for each in running.workers()])
    assert slot not in {answer(clients.enter_context(request()))["slot"] for _ in range(8)}
    assert running.log.count("is hung") == 1


@pytest.mark.needs("netns", "bpf", "pidfd_getfd", "io_uring")
def test_spinning_with_a_multishot_accept(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """It computes: so it gets nothing new until it waits again, and is let be."""
    running = uring(service, home)
    slot = taken_by(running, "/spins", clients)
    eventually(lambda: full(running), [slot])
    assert slot not in {answer(clients.enter_context(request()))["slot"] for _ in range(8)}
    (home / "go").touch()
    eventually(lambda: full(running), [])
    eventually(lambda: answer(clients.enter_context(request()))["slot"] == slot)
    assert "is hung" not in running.log
