"""Sockets as programs of bpf/inspect.c see them, against what their owner knows of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from steer.errors import KernelError
from steer.linux.processes import socket_inode
from steer.loader import kernel_sockets
from steer.loader.btf import FUNCTION, STRUCT, KernelTypes
from steer.loader.kernel_sockets import KernelSocket, Look
from steer.policy import classic
from steer.sockets import group_program
from testkit.bpf_objects import bpf_ids
from testkit.namespaces import network_namespace
from testkit.processes import eventually, line_of, python, running

pytestmark = pytest.mark.needs("tracing", "netns")

SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
UDP_SEGMENT = 103  # include/uapi/linux/udp.h
HOSTS = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6, "::": socket.AF_INET6}


@pytest.fixture
def look(netns: object) -> Iterator[Look]:
    with Look() as opened:
        yield opened


def member(host: str, port: int = 0, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(HOSTS[host], kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    if kind == socket.SOCK_STREAM:
        sock.listen(7)
    return sock


def one_of(found: Iterator[KernelSocket], sock: socket.socket) -> KernelSocket:
    """As if there were others; there may be several descriptors."""
    return next(each for each in found if each.inode == socket_inode(sock.fileno()))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("host", HOSTS)
def test_a_socket_is_seen_as_it_is(look: Look, host: str, kind: int) -> None:
    with member(host, kind=kind) as sock:
        here = one_of(look.in_this_netns(), sock)
        held = one_of(look.held(), sock)
        port = sock.getsockname()[1]
    assert held == here._replace(pid=os.getpid(), fd=held.fd)
    assert socket.inet_ntop(here.family, here.ip[: 4 if here.family == 2 else 16]) == host
    assert (here.port, here.uid) == (port, os.getuid())
    assert here.protocol == (6 if kind == socket.SOCK_STREAM else 17)
    # As is_v6only each but a wildcard is, see __inet6_bind() of net/ipv6/af_inet6.c.
    assert (here.is_reuseport, here.is_v6only, here.cookie) == (1, host == "::1", 0)
    assert here.netns == os.stat("/proc/thread-self/ns/net").st_ino
    assert here.group
    assert not here.program
    if kind == socket.SOCK_STREAM:
        assert (here.queued, here.backlog) == (0, 7)


def test_a_group_is_one_and_has_all_its_members(look: Look) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(member("127.0.0.1"))
        port = first.getsockname()[1]
        group = [first, *(stack.enter_context(member("127.0.0.1", port)) for _ in range(3))]
        stack.enter_context(member("::1", port))
        found = [each for each in look.in_this_netns() if each.port == port]
        assert len({each.group for each in found}) == 2
        assert {each.group: each.members for each in found}[one_of(iter(found), first).group] == 4
        assert {each.inode for each in found} >= {socket_inode(sock.fileno()) for sock in group}


def test_what_waits_is_counted(look: Look) -> None:
    with member("127.0.0.1") as sock, socket.create_connection(sock.getsockname()):
        eventually(lambda: one_of(look.in_this_netns(), sock).queued, 1)


def test_a_datagram_that_waits_takes_memory(look: Look) -> None:
    with (
        member("127.0.0.1", kind=socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.sendto(b"x", sock.getsockname())
        eventually(lambda: one_of(look.in_this_netns(), sock).memory)
        seen = one_of(look.in_this_netns(), sock)
        assert seen.memory < seen.memory_limit


def test_drops_are_counted(look: Look) -> None:
    with (
        member("127.0.0.1", kind=socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(50):
            client.sendto(bytes(4000), sock.getsockname())
        eventually(lambda: one_of(look.in_this_netns(), sock).drops)
        assert one_of(look.in_this_netns(), sock).drops <= 50


def test_connections_are_not_listed(look: Look) -> None:
    with (
        member("127.0.0.1") as sock,
        socket.create_connection(sock.getsockname()) as client,
        sock.accept()[0] as accepted,
    ):
        found = {each.inode for each in (*look.in_this_netns(), *look.held())}
        assert not found & {socket_inode(each.fileno()) for each in (client, accepted)}


def test_a_classic_program_is_told_from_others(look: Look) -> None:
    with member("127.0.0.1") as sock:
        group_program.attach_cbpf(sock.fileno(), list(classic.NOTHING))
        seen = one_of(look.in_this_netns(), sock)
        assert seen.program
        assert (seen.classic_length, seen.program_id) == (len(classic.NOTHING), 0)


def test_sockets_of_other_namespaces_are_seen_by_who_holds_them(look: Look) -> None:
    with network_namespace():
        sock = member("127.0.0.1")
    with sock:
        assert socket_inode(sock.fileno()) not in {each.inode for each in look.in_this_netns()}
        there = one_of(look.held(), sock)
        assert there.netns != os.stat("/proc/thread-self/ns/net").st_ino
        assert there.pid == os.getpid()


def test_a_holder_is_named_as_we_see_it(look: Look) -> None:
    """By all that have it, and not only the first."""
    with member("127.0.0.1") as sock:
        code = "import sys; print('ready', flush=True); sys.stdin.read()"
        with running(*python(code), fds=[sock.fileno()]) as other:
            assert line_of(other) == "ready"
            pids = {each.pid for each in look.held() if each.inode == socket_inode(sock.fileno())}
            assert pids == {os.getpid(), other.pid}


@pytest.mark.needs("counting")
def test_connections_are_counted_where_they_were_accepted(look: Look) -> None:
    with (
        member("127.0.0.1") as sock,
        member("127.0.0.1", sock.getsockname()[1]) as other,
        member("::1") as unused,
        look.count("tcp", 100) as count,
    ):
        at = {each.inode: each.address for each in look.in_this_netns()}
        count.add_this_netns()
        for each in (sock, other):
            each.listen(20)
        for _ in range(20):
            with socket.create_connection(sock.getsockname()):
                pass
        eventually(lambda: sum(count.so_far().values()), 20)
        assert count.so_far()[at[socket_inode(unused.fileno())]] == 0
        addresses = {at[socket_inode(each.fileno())] for each in (sock, other, unused)}
        assert count.so_far().keys() == addresses


@pytest.mark.needs("counting")
def test_connections_that_were_there_before_are_not_counted(look: Look) -> None:
    with (
        member("127.0.0.1") as sock,
        socket.create_connection(sock.getsockname()),
        sock.accept()[0],
        look.count("tcp", 100) as count,
    ):
        seen = one_of(look.in_this_netns(), sock)
        count.add_this_netns()
        assert count.so_far() == {seen.address: 0}
        with socket.create_connection(sock.getsockname()):
            eventually(count.so_far, {seen.address: 1})


def send(number: int, to: socket.socket, size: int = 1) -> None:
    """From a new client each, so that the hash selects any socket of a group."""
    for _ in range(number):
        with socket.socket(to.family, socket.SOCK_DGRAM) as client:
            client.sendto(bytes(size), to.getsockname())


def take_all(sock: socket.socket) -> int:
    """How many datagrams wait in a socket."""
    taken = 0
    with suppress(BlockingIOError):
        while True:
            sock.recv(1, socket.MSG_DONTWAIT)
            taken += 1
    return taken


@pytest.mark.needs("counting")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_are_counted_where_they_were_received(look: Look, host: str) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(member(host, kind=socket.SOCK_DGRAM))
        port = first.getsockname()[1]
        socks = [first, *(stack.enter_context(member(host, port, first.type)) for _ in range(3))]
        unused = stack.enter_context(member(host, kind=socket.SOCK_DGRAM))
        at = {each.inode: each.address for each in look.in_this_netns()}
        send(7, first)
        taken = [take_all(each) for each in socks]
        count = stack.enter_context(look.count("udp", 100))
        count.add_this_netns()
        send(300, first)
        found = count.so_far()
        counted = [found[at[socket_inode(each.fileno())]] for each in socks]
        assert counted == [take_all(each) for each in socks]
        assert (sum(taken), sum(counted)) == (7, 300)
        assert found[at[socket_inode(unused.fileno())]] == 0
        assert min(counted) > 0


@pytest.mark.needs("counting")
def test_datagrams_that_find_the_queue_full_are_not_counted(look: Look) -> None:
    with member("127.0.0.1", kind=socket.SOCK_DGRAM) as sock, look.count("udp", 10) as count:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        count.add_this_netns()
        send(50, sock, 1000)
        address = one_of(look.in_this_netns(), sock).address
        received = count.so_far()[address]
        assert received == take_all(sock)
        assert 0 < received < 50
        assert one_of(look.in_this_netns(), sock).drops == 50 - received


@pytest.mark.needs("counting")
def test_datagrams_of_several_cpus_at_once_are_counted(look: Look) -> None:
    """Which hand them to each other since Linux 6.18."""
    with member("127.0.0.1", kind=socket.SOCK_DGRAM) as sock, look.count("udp", 10) as count:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        count.add_this_netns()
        code = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "s.connect(('127.0.0.1', int(sys.argv[1])))\n"
            "for _ in range(5000): s.send(b'x')\n"
            "print('sent', flush=True)"
        )
        with ExitStack() as stack:
            command = python(code, sock.getsockname()[1])
            clients = [stack.enter_context(running(*command)) for _ in range(3)]
            assert [line_of(each) for each in clients] == ["sent"] * 3
        address = one_of(look.in_this_netns(), sock).address
        assert (count.so_far()[address], count.missed()) == (15000, 0)
        assert take_all(sock) == 15000


@pytest.mark.needs("counting")
def test_segments_of_one_send_are_counted_each(look: Look) -> None:
    """As a QUIC server sends them (UDP_SEGMENT of udp(7))."""
    with (
        member("127.0.0.1", kind=socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        look.count("udp", 10) as count,
    ):
        count.add_this_netns()
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
        client.sendto(bytes(1000), sock.getsockname())
        address = one_of(look.in_this_netns(), sock).address
        assert count.so_far()[address] == 10
        assert take_all(sock) == 10


@pytest.mark.needs("counting")
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_counting_leaves_nothing(look: Look, protocol: str) -> None:
    before = bpf_ids(os.getpid())
    with look.count(protocol, 10) as count:
        count.add_this_netns()
        assert bpf_ids(os.getpid()) > before
    assert bpf_ids(os.getpid()) == before


def test_thousands_of_listeners_are_read_whole(look: Look) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(member("127.0.0.1"))
        port = first.getsockname()[1]
        for _ in range(999):
            stack.enter_context(member("127.0.0.1", port))
        assert sum(each.port == port for each in look.in_this_netns()) == 1000
        assert sum(each.port == port for each in look.held()) == 1000


def test_who_holds_a_program_is_found(look: Look) -> None:
    with member("127.0.0.1") as sock:
        group_program.attach_cbpf(sock.fileno(), list(classic.NOTHING))
        program = one_of(look.in_this_netns(), sock).program
        assert look.holders({program}) == {program: set()}


def test_what_the_kernel_has_not_got_is_none() -> None:
    with KernelTypes() as types:
        assert types.offset_bits("sock", "no_such_field") is None
        assert types.offset_bits("no_such_struct", "field") is None
        assert types.offset_bits("sock", "sk_backlog.no_such_field") is None
        assert types.size_bytes("no_such_struct") is None
        with pytest.raises(KernelError, match=r"find bpf_iter_nothing in the kernel's types"):
            types.number("bpf_iter_nothing", FUNCTION)


def test_fields_of_members_without_a_name_are_found() -> None:
    with KernelTypes() as types:
        assert types.number("sock_common", STRUCT)
        assert types.offset_bits("sock_common", "skc_num") == 112


def test_all_offsets_are_known() -> None:
    with KernelTypes() as types:
        assert len(kernel_sockets.pack_offsets(types)) == 4 * (len(kernel_sockets.FIELDS) + 1)
