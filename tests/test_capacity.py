"""Workers at their own limit: nothing is cut, and others get what waits for them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from clients import request
from conftest import StartService
from crew import PORT
from support import Service, eventually, is_ready

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
        note = "at capacity: every worker; connections wait until one takes them"
        eventually(lambda: note in running.status()["notes"])
        assert not any(is_ready(each, 0.2) for each in slow)

        behind.release()
        assert all(map(is_ok, slow))
        eventually(lambda: full(running), [])
        assert [each["pid"] for each in running.workers()] == before
        assert "hangs" not in running.log
        for _ in range(4):
            assert is_ok(clients.enter_context(request()))
        assert all(each["restarts"] == 0 for each in running.workers())
