"""What came to any socket of a network namespace, told by what the kernel counts for all."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest

from steer.sockets import traffic
from testkit.namespaces import Netns
from testkit.processes import eventually

pytestmark = pytest.mark.needs("netns")

HOSTS: Mapping[str, socket.AddressFamily] = {
    "127.0.0.1": socket.AF_INET,
    "::1": socket.AF_INET6,
}


@pytest.fixture(params=HOSTS)
def host(netns: Netns, request: pytest.FixtureRequest) -> str:
    """An address in a namespace where nobody else is."""
    return str(request.param)


def test_a_connection_is_told_though_it_is_over(host: str) -> None:
    with socket.create_server((host, 0), family=HOSTS[host]) as listener:
        before = traffic.pulse({"tcp"})
        assert before == traffic.pulse({"tcp"})
        with socket.create_connection(listener.getsockname()[:2]):
            listener.accept()[0].close()
        assert traffic.pulse({"tcp"}) != before


def test_a_datagram_is_told_though_it_was_read(host: str) -> None:
    with (
        socket.socket(HOSTS[host], socket.SOCK_DGRAM) as sock,
        socket.socket(HOSTS[host], socket.SOCK_DGRAM) as sender,
    ):
        sock.bind((host, 0))
        before = traffic.pulse({"udp"}), traffic.pulse({"tcp"})
        sender.sendto(b"x", sock.getsockname())
        assert sock.recv(10) == b"x"
        assert traffic.pulse({"udp"}) != before[0]
        assert traffic.pulse({"tcp"}) == before[1]


def test_a_datagram_is_told_though_it_was_dropped(host: str) -> None:
    with (
        socket.socket(HOSTS[host], socket.SOCK_DGRAM) as sock,
        socket.socket(HOSTS[host], socket.SOCK_DGRAM) as sender,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock.bind((host, 0))
        sender.connect(sock.getsockname())
        sender.send(bytes(2000))  # one is let in, whatever its size
        before = traffic.pulse({"udp"})
        sender.send(bytes(2000))
        eventually(lambda: traffic.pulse({"udp"}) != before)
