"""UDP sockets that are bound and closed, as an attached group learns of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from steer.attach.attachment import Attachment
from steer.attach.binds import listeners_at
from steer.attach.watch import Watch
from steer.config.address import Bind
from steer.linux.processes import socket_inode
from steer.sockets import reuseport
from testkit.processes import is_ready

pytestmark = [
    pytest.mark.needs("bpf", "netns", "root"),
    pytest.mark.usefixtures("netns"),
]

PORT, ROOT_CGROUP = 8733, 1
HOSTS = ["127.0.0.1", "::1"]


def bound(host: str, port: int = PORT, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    return sock


@pytest.fixture
def attachment() -> Iterator[Attachment]:
    with closing(Attachment(PORT, 8)) as made:
        yield made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def watching(attachment: Attachment, host: str, stack: ExitStack) -> Watch:
    watch = stack.enter_context(closing(Watch(attachment, Bind("udp", host, PORT))))
    watch.on([ROOT_CGROUP])
    return watch


@pytest.mark.parametrize("host", HOSTS)
def test_socket_that_is_bound_to_the_port_is_reported(
    attachment: Attachment, stack: ExitStack, host: str
) -> None:
    watch = watching(attachment, host, stack)
    stack.enter_context(bound(host, PORT + 1))
    stack.enter_context(bound(host, kind=socket.SOCK_STREAM))
    assert not is_ready(watch.events)
    stack.enter_context(bound(host))
    assert is_ready(watch.events)


@pytest.mark.parametrize("host", HOSTS)
def test_slot_of_a_socket_that_closes_is_marked(
    attachment: Attachment, stack: ExitStack, host: str
) -> None:
    member, other = bound(host), bound(host)
    attachment.joins(3, reuseport.cookie(member.fileno()))
    watch = watching(attachment, host, stack)
    other.close()
    assert not is_ready(watch.events)
    assert not attachment.is_closing(3)
    member.close()
    assert attachment.is_closing(3)
    assert is_ready(watch.events)


def test_only_unconnected_sockets_at_exactly_the_address_are_members(stack: ExitStack) -> None:
    members = [stack.enter_context(bound("127.0.0.1")) for _ in range(2)]
    connected, wildcard = bound("127.0.0.1"), bound("0.0.0.0")
    stack.enter_context(connected).connect(("127.0.0.1", 9))
    stack.enter_context(wildcard)
    stack.enter_context(bound("127.0.0.1", kind=socket.SOCK_STREAM)).listen()
    found = listeners_at(Bind("udp", "127.0.0.1", PORT))
    assert found.keys() == {socket_inode(each.fileno()) for each in members}


def test_what_waits_at_a_socket_is_seen_in_bytes(stack: ExitStack) -> None:
    member = stack.enter_context(bound("127.0.0.1"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", ("127.0.0.1", PORT))
    (found,) = listeners_at(Bind("udp", "127.0.0.1", PORT)).values()
    limit = member.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert (found.queued > 0, found.limit) == (True, limit)
