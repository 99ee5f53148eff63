"""What waits at workers: asked for by the port, or seen in borrowed sockets."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from steer.config import address
from steer.errors import KernelError
from steer.linux import processes
from steer.sockets import inet_diag, listeners, sock_diag
from steer.sockets.listeners import Waiting
from steer.sockets.sock_diag import Bound
from steer.workers.queues import Queues
from testkit.processes import eventually

# The kernel

FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


@pytest.mark.parametrize("host", FAMILIES)
def test_it_says_what_the_listener_says(host: str) -> None:
    with ExitStack() as stack:
        family = FAMILIES[host]
        listener = stack.enter_context(socket.create_server((host, 0), family=family, backlog=7))
        port = listener.getsockname()[1]
        inode = processes.socket_inode(listener.fileno())
        for number in range(3):
            assert sock_diag.waiting("tcp", family, port)[inode] == Waiting(number, 7)
            stack.enter_context(socket.create_connection((host, port)))
            eventually(lambda: listeners.waiting(listener).queued, number + 1)
        assert sock_diag.waiting("tcp", family, port)[inode] == listeners.waiting(listener)
        assert sock_diag.waiting("tcp", family, 1) == {}
        listener.shutdown(socket.SHUT_RDWR)
        assert inode not in sock_diag.waiting("tcp", family, port)


@pytest.mark.parametrize("host", FAMILIES)
def test_it_says_what_the_datagram_socket_says(host: str) -> None:
    family = FAMILIES[host]
    with (
        socket.socket(family, socket.SOCK_DGRAM) as sock,
        socket.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        sock.bind((host, 0))
        port, inode = sock.getsockname()[1], processes.socket_inode(sock.fileno())
        assert sock_diag.waiting("udp", family, port)[inode] == listeners.waiting(sock)
        sender.sendto(b"x" * 100, (host, port))
        eventually(lambda: listeners.waiting(sock).queued)
        assert sock_diag.waiting("udp", family, port)[inode] == listeners.waiting(sock)


@pytest.mark.parametrize(("host", "other"), [("127.0.0.1", "127.0.0.2"), ("::1", "::")])
def test_it_knows_connected_datagram_sockets_by_address_and_device(host: str, other: str) -> None:
    family = FAMILIES[host]
    with (
        socket.socket(family, socket.SOCK_DGRAM) as sock,
        socket.socket(family, socket.SOCK_DGRAM) as peer,
    ):
        sock.bind((host, 0))
        peer.bind((host, 0))
        port = sock.getsockname()[1]
        assert not sock_diag.connected(family, host, port, 0)
        sock.connect(peer.getsockname())
        assert sock_diag.connected(family, host, port, 0)
        assert not sock_diag.connected(family, other, port, 0)
        assert not sock_diag.connected(family, host, port, 1)


def test_hundreds_are_read_whole() -> None:
    """More than one answer of the kernel holds."""
    with ExitStack() as stack:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0), reuse_port=True))
        port = first.getsockname()[1]
        others = [
            stack.enter_context(socket.create_server(("127.0.0.1", port), reuse_port=True))
            for _ in range(399)
        ]
        inodes = {processes.socket_inode(each.fileno()) for each in (first, *others)}
        assert sock_diag.waiting("tcp", socket.AF_INET, port).keys() == inodes


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_what_is_said_again_is_not_read_again(protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    ports = sock_diag.Ports()
    with socket.socket(socket.AF_INET, kind) as sock, ExitStack() as stack:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            sock.listen(7)
        port = sock.getsockname()[1]
        first = ports.at(protocol, socket.AF_INET, port)
        assert first.keys() == {processes.socket_inode(sock.fileno())}
        assert ports.at(protocol, socket.AF_INET, port) is first
        sender = stack.enter_context(socket.socket(socket.AF_INET, kind))
        sender.connect(sock.getsockname())
        sender.send(b"x")
        eventually(lambda: listeners.waiting(sock).queued)
        (seen,) = ports.at(protocol, socket.AF_INET, port).values()
        assert seen.queued == listeners.waiting(sock).queued


def test_answers_that_are_not_alike_are_read_one_by_one() -> None:
    """One bound to a device may be told of in more bytes than others."""
    alike, longer = (message(inode, more) for inode, more in ((1, b""), (2, bytes(8))))
    for answer in (alike * 2, alike + longer, longer + alike, alike + longer + longer):
        found = list(inet_diag.listeners(answer))
        assert [each for _, *each in found] == [[3, 9, 5]] * len(found)
        assert len(found) == answer.count(b"NODE")
        assert {inode for inode, *_ in found} <= {1, 2}


def message(inode: int, more: bytes) -> bytes:
    """A listener with a queue of 3 of 9, bound to device 5 (struct inet_diag_msg)."""
    identity = struct.pack("=4s16s16sI8s", b"PORT", bytes(16), bytes(16), 5, b"NODE" * 2)[:-4]
    body = struct.pack("=BB2x", socket.AF_INET, 10) + identity + bytes(4)
    body += struct.pack("=IIIII", 0, 3, 9, 0, inode) + more
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body


def test_what_connections_move(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"12345")
        assert sock_diag.connections(socket.AF_INET, port, 10) == []  # nobody accepted it
        accepted, _ = listener.accept()
        with accepted:
            inode = processes.socket_inode(accepted.fileno())

            def seen() -> tuple[int, int]:
                (found,) = sock_diag.connections(socket.AF_INET, port, 10)
                assert found.inode == inode
                return found.unread, found.moved

            eventually(seen, (5, 0))
            assert accepted.recv(2) == b"12"
            eventually(seen, (3, 2))
            accepted.sendall(b"abc")
            eventually(seen, (3, 5))
            assert sock_diag.connections(socket.AF_INET, port, 0) == []


# Which way


class FakeKernel:
    """Answers for port 80, or refuses.

    Args:
        number: errno of the refusal.
    """

    def __init__(self, number: int = 0) -> None:
        self.asked = 0
        self.number = number

    def __call__(self, protocol: str, family: int, port: int) -> dict[int, Waiting]:
        self.asked += 1
        if self.number:
            raise KernelError.from_oserror("ask", OSError(self.number, "refused"))
        return {100 + each: Waiting(each, 9) for each in range(3)}


def worker(*inodes: int, borrowed: Mapping[int, socket.socket] | None = None) -> Any:
    """One with its sockets on port 80.

    Args:
        borrowed: what it lends; None: that is refused.
    """

    @contextmanager
    def sockets() -> Iterator[Mapping[int, socket.socket]]:
        if borrowed is None:
            raise KernelError("borrow", "EPERM", errno=errno.EPERM)
        yield borrowed

    binds = [address.parse("127.0.0.1:80") for _ in inodes]
    return SimpleNamespace(launch=SimpleNamespace(binds=binds), bound=inodes, sockets=sockets)


def test_one_answer_is_for_all_workers() -> None:
    now_s = 100.0
    kernel = FakeKernel()
    queues = Queues(kernel, lambda: now_s)
    assert queues.of(worker(101)) == {0: Waiting(1, 9)}
    assert queues.of(worker(102, 100)) == {0: Waiting(2, 9), 1: Waiting(0, 9)}
    assert queues.of(worker(7)) == {}
    assert kernel.asked == 1
    now_s += 0.01
    queues.of(worker(101))
    assert kernel.asked == 2


@pytest.mark.parametrize(("took_s", "fresh_s"), [(0.0, 0.005), (0.001, 0.02), (0.01, 0.05)])
def test_an_answer_that_took_long_is_fresh_for_longer(took_s: float, fresh_s: float) -> None:
    """But never for so long that a worker could be taken for one that hangs."""
    now_s = 100.0
    asked = 0

    def ask(*_: object) -> dict[int, Bound]:
        nonlocal now_s, asked
        now_s, asked = now_s + took_s, asked + 1
        return {}

    queues = Queues(ask, lambda: now_s)
    queues.of(worker(101))
    now_s = 100.0 + 0.9 * fresh_s
    queues.of(worker(101))
    assert asked == 1
    now_s = 100.0 + 1.1 * fresh_s
    queues.of(worker(101))
    assert asked == 2


def test_who_moved_a_queue_sees_that_it_is_empty() -> None:
    """Or would move it again, and a worker that waits at it just then see its listener fail."""
    kernel = FakeKernel()
    queues = Queues(kernel, lambda: 100.0)
    queues.of(worker(101))
    queues.forget()
    queues.of(worker(101))
    assert kernel.asked == 2


def test_an_answer_from_before_is_not_taken() -> None:
    kernel = FakeKernel()
    queues = Queues(kernel, lambda: 100.0)
    queues.of(worker(101))
    queues.of(worker(101), after_s=100.0)
    assert kernel.asked == 1
    queues.of(worker(101), after_s=100.001)
    assert kernel.asked == 2


def test_where_the_kernel_may_not_be_asked_sockets_are_borrowed(listener: socket.socket) -> None:
    kernel = FakeKernel(errno.EPERM)
    queues = Queues(kernel)
    assert queues.of(worker(101, borrowed={0: listener})) == {0: listeners.waiting(listener)}
    assert queues.of(worker(101)) is None
    assert kernel.asked == 1


def test_a_refusal_that_passes_is_not_remembered(listener: socket.socket) -> None:
    kernel = FakeKernel(errno.EMFILE)
    queues = Queues(kernel)
    assert queues.of(worker(101)) is None
    kernel.number = 0
    assert queues.of(worker(101)) == {0: Waiting(1, 9)}
