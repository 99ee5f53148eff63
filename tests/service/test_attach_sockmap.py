"""`steer attach` to sockets that are in a sockmap of their server, as nginx's are with quic_bpf."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from steer.abi import BPF_MAP_TYPE_SOCKMAP
from steer.attach import sockmap
from steer.backends.ebpf import Ebpf
from steer.config.planning import plan
from steer.config.service import Service as ServiceConfig
from steer.config.sources import changed
from steer.linux import topology
from steer.loader import find
from steer.loader.bpf_maps import Map
from steer.policy.layout import Member
from steer.sockets import reuseport
from testkit.attached import HOST, Attach, attaching
from testkit.harness import CPUS, PORT
from testkit.processes import eventually
from testkit.service import Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

KINDS = {"udp": socket.SOCK_DGRAM, "tcp": socket.SOCK_STREAM}


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


def where(protocol: str) -> str:
    return f"{protocol}://{HOST}:{PORT}"


def bound(protocol: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, KINDS[protocol])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((HOST, PORT))
    if protocol == "tcp":
        sock.listen(512)
    sock.setblocking(False)
    return sock


class Server:
    """Sockets of this process, and the sockmap that has them."""

    def __init__(self, protocol: str, number: int) -> None:
        self.protocol = protocol
        self.sockmap = Map("sockets", 16, BPF_MAP_TYPE_SOCKMAP)
        self.sockets = [bound(protocol) for _ in range(number)]
        for index, each in enumerate(self.sockets):
            self.sockmap.put_socket(index, each.fileno())

    def got(self, number: int) -> list[int]:
        """How many of so many datagrams or connections each socket gets."""
        for _ in range(number):
            with socket.socket(socket.AF_INET, KINDS[self.protocol]) as client:
                client.connect((HOST, PORT))
                client.send(b"x")
        return [self._take_all(each) for each in self.sockets]

    def _take_all(self, sock: socket.socket) -> int:
        taken = 0
        with suppress(BlockingIOError):
            while True:
                sock.recv(10) if self.protocol == "udp" else sock.accept()[0].close()
                taken += 1
        return taken

    def close(self) -> None:
        self.sockmap.close()
        for each in self.sockets:
            each.close()


@contextmanager
def server(protocol: str, number: int = 3) -> Iterator[Server]:
    with closing(Server(protocol, number)) as made:
        yield made


def is_fair(got: list[int], total: int) -> bool:
    return sum(got) == total and max(got) - min(got) <= len(CPUS)


def states(attached: Service) -> list[str]:
    return [each["state"] for each in attached.workers()]


@pytest.mark.parametrize("protocol", KINDS)
def test_sockets_get_their_turns_and_stay_in_the_sockmap_of_the_server(
    attach: Attach, protocol: str
) -> None:
    with server(protocol) as one:
        attached = attach("--policy", "round-robin", where=where(protocol))
        assert is_fair(one.got(90), 90)
        assert "they are selected from one" in attached.log
        assert attached.steer("policy", "hash").returncode == 0
        assert sum(one.got(30)) == 30
        assert sum(attached.selected().values()) == 120
        assert attached.stop() == 0
        assert all(one.sockmap.has(index) for index in range(3))
        attached.leaves_nothing()


@pytest.mark.parametrize("protocol", KINDS)
def test_sockets_come_and_go(attach: Attach, protocol: str) -> None:
    """New ones whether they are in the sockmap of the server or not."""
    with server(protocol) as one:
        attached = attach("--policy", "round-robin", where=where(protocol))
        one.sockets.pop().close()
        eventually(lambda: len(states(attached)) == 2)
        one.sockets.append(bound(protocol))
        one.sockets.append(bound(protocol))
        one.sockmap.put_socket(7, one.sockets[-1].fileno())
        eventually(lambda: len(states(attached)) == 4)
        for each in one.sockets:
            each.setblocking(False)
        assert states(attached)[:2] == ["ready"] * 2
        assert is_fair(one.got(60)[:2], 60)
        assert attached.stop() == 0


def test_attacher_that_re_executes_itself_selects_from_a_sockmap_again(attach: Attach) -> None:
    with server("udp") as one:
        attached = attach("--policy", "round-robin", where=where("udp"))
        attached.send_signal(signal.SIGUSR2)
        eventually(lambda: attached.log.count("they are selected from one") == 2)
        eventually(lambda: states(attached), ["ready"] * 3)
        assert is_fair(one.got(60), 60)
        assert attached.stop() == 0


def test_program_that_selects_from_a_sockmap_is_replaced_and_put_back(attach: Attach) -> None:
    """As that of nginx does. It selects two of three sockets."""
    asked = {"bind": [where("udp")], "policy": "round-robin", "workers": 3, "backend": "ebpf"}
    service = changed(ServiceConfig(), asked, "test")
    decided = plan(service, topology.read(), {}, find.find("round-robin"))
    with server("udp") as one, closing(Ebpf(decided, sockmap=True)) as own:
        for slot, each in enumerate(one.sockets):
            own.add_member(slot, [reuseport.duplicate(each.fileno()).detach()])
        own.steer([Member(0), Member(1)])
        assert is_fair(one.got(40)[:2], 40)
        attached = attach("--policy", "round-robin", "--replace", where=where("udp"))
        assert is_fair(one.got(60), 60)
        assert attached.stop() == 0
        assert is_fair(one.got(40)[:2], 40)


def test_sockmap_is_needed_for_sockets_of_one_only() -> None:
    with ExitStack() as stack:
        free, taken, mapped = (stack.enter_context(bound("udp")) for _ in range(3))
        array = stack.enter_context(Map("sockets", 4))
        array.put_socket(0, taken.fileno())
        theirs = stack.enter_context(Map("sockets", 4, BPF_MAP_TYPE_SOCKMAP))
        theirs.put_socket(0, mapped.fileno())
        assert not sockmap.is_needed([free, taken])
        assert sockmap.is_needed([free, taken, mapped])
        assert (array.has(0), theirs.has(0)) == (True, True)
        array.put_socket(1, free.fileno())  # it is in no map
