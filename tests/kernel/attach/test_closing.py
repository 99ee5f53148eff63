"""Listeners that close under load, of an attached group.

The test is the server, and what attaches: so the only thing that can lose a connection is the
close itself.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from steer.attach.attachment import Attachment, Heartbeat
from steer.attach.counting import CountingElsewhere
from steer.attach.watch import Watch
from steer.backends import backup
from steer.backends.ebpf import Ebpf
from steer.config.planning import plan
from steer.config.service import Service
from steer.config.sources import changed
from steer.linux import topology
from steer.loader import find
from steer.policy.layout import Member
from steer.sockets import reuseport
from testkit.processes import is_ready, line_of, running
from testkit.programs import path

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root"),
    pytest.mark.usefixtures("netns"),
]

HOST, PORT, LISTENERS, CLIENTS = "127.0.0.1", 8732, 8, 6
"""A port of no other test: listeners of all network namespaces are reported."""
CLOSINGS = 6000
ROOT_CGROUP = 1


class Server:
    """Listeners in the slots of a backend, and the connections that they accept."""

    def __init__(self) -> None:
        asked = {"bind": [f"{HOST}:{PORT}"], "policy": "round-robin", "workers": LISTENERS}
        decided = plan(
            changed(Service(), {**asked, "backend": "ebpf"}, "test"),
            topology.read(),
            {},
            find.find("round-robin"),
        )
        capacity = decided.slots + backup.COUNT
        with ExitStack() as stack:
            self.attachment = stack.enter_context(closing(Attachment(PORT, capacity)))
            counting = stack.enter_context(closing(CountingElsewhere(capacity)))
            self._backend = stack.enter_context(
                closing(Ebpf(decided, counting=counting, attachment=self.attachment.maps))
            )
            self.watch = stack.enter_context(closing(Watch(self.attachment, decided.binds[0])))
            stack.enter_context(closing(Heartbeat(self.attachment.beat)))
            self._epoll = stack.enter_context(select.epoll())
            self._listeners: dict[int, socket.socket] = {}
            self._slots = [self._listen(slot) for slot in range(LISTENERS)]
            self._backend.steer([Member(slot) for slot in range(LISTENERS)])
            self._clients: dict[int, socket.socket] = {}
            stack.callback(self._close_sockets)
            self.close = stack.pop_all().close

    def _close_sockets(self) -> None:
        for sock in (*self._slots, *self._clients.values()):
            sock.close()

    def _listen(self, slot: int) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((HOST, PORT))
        made.listen(512)
        made.setblocking(False)
        self.attachment.joins(slot, reuseport.cookie(made.fileno()))
        self._backend.add_member(slot, [reuseport.duplicate(made.fileno()).detach()])
        self._epoll.register(made, select.EPOLLIN)
        self._listeners[made.fileno()] = made
        return made

    def close_listener(self, slot: int) -> None:
        """Whatever is on its way to it."""
        old = self._slots[slot]
        self._epoll.unregister(old)
        del self._listeners[old.fileno()]
        old.close()

    def replace(self, slot: int) -> None:
        """Close the listener there, and open another."""
        cookie = reuseport.cookie(self._slots[slot].fileno())
        self.close_listener(slot)
        self.attachment.leaves(cookie)
        self._backend.remove_member(slot)
        self._slots[slot] = self._listen(slot)

    def serve(self, seconds: float) -> None:
        """Answer whoever is there, or comes within that time."""
        for fd, _ in self._epoll.poll(seconds):
            if fd in self._listeners:
                self._accept(self._listeners[fd])
            else:
                client = self._clients.pop(fd)
                with client, suppress(OSError):
                    client.recv(100)
                    client.sendall(b"ok")

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError):
            for _ in range(16):
                client, _ = listener.accept()
                self._epoll.register(client, select.EPOLLIN)
                self._clients[client.fileno()] = client


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def unanswered(server: Server, closings: int) -> int:
    """How many connections are not answered while so many listeners close."""
    command = (sys.executable, path("asks_again_and_again"), HOST, str(PORT))
    with ExitStack() as stack:
        clients = [stack.enter_context(running(*command)) for _ in range(CLIENTS)]
        for number in range(closings):
            server.serve(0.001)
            server.replace(number % LISTENERS)
        for client in clients:
            assert client.stdin
            client.stdin.write("\n")
            client.stdin.flush()
        while any(client.poll() is None for client in clients):
            server.serve(0.01)
        lines = [line_of(client) and line_of(client) for client in clients]
    answered, failed = zip(*(map(int, line.split()) for line in lines), strict=True)
    assert sum(answered) > closings
    return sum(failed)


def test_no_connection_is_lost_to_a_listener_that_closes(server: Server) -> None:
    server.watch.on([ROOT_CGROUP])
    assert unanswered(server, CLOSINGS) == 0


def test_slot_of_a_listener_that_closes_is_marked(server: Server) -> None:
    server.watch.on([ROOT_CGROUP])
    assert not server.attachment.is_closing(3)
    server.close_listener(3)
    assert server.attachment.is_closing(3)
    assert is_ready(server.watch.events)
    server.watch.events.skip()
    assert not is_ready(server.watch.events)


def test_new_listener_is_announced(server: Server) -> None:
    server.watch.on([ROOT_CGROUP])
    server.watch.events.skip()
    with socket.create_server((HOST, 0)):
        assert not is_ready(server.watch.events)
    server.replace(0)
    assert is_ready(server.watch.events)
