"""Asks sock_diag(7) about the sockets at a port: their queues, the bytes of their connections, and
how they are bound.

This takes no descriptor of the sockets, no privilege, and no ptrace(2) access to the processes that
have them open. A thousand listeners take a millisecond.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec

from steer.sockets import inet_diag
from steer.sockets.listeners import Waiting

_SK_MEMINFO_DROPS = 8
_MEMORY = struct.Struct("=II")
"""SK_MEMINFO_RMEM_ALLOC and _RCVBUF of linux/sock_diag.h."""
_BYTES = struct.Struct("=120xQQ")
"""tcpi_bytes_acked and tcpi_bytes_received of struct tcp_info, linux/tcp.h."""
_ESTABLISHED, _CLOSE, _CLOSE_WAIT, _LISTEN = 1, 7, 8, 10  # include/net/tcp_states.h
_UDP_STATES = 1 << _CLOSE | 1 << _ESTABLISHED
"""A UDP socket is in state 7 (TCP_CLOSE), or in state 1 (TCP_ESTABLISHED) if it is connected."""


class Connection(msgspec.Struct, frozen=True):
    """A connection that a process has accepted.

    Args:
        inode: see `processes.socket_inode`.
        unread: received bytes that the process has not read.
        moved: bytes that the process has read, and bytes it has sent that were acknowledged.
    """

    inode: int
    unread: int
    moved: int


def waiting(protocol: str, family: int, port: int) -> dict[int, Waiting]:
    """What waits in the TCP listeners or UDP sockets bound to a port of this network namespace, by
    socket inode. TCP sockets that do not listen are left out.

    Args:
        protocol: "tcp" or "udp".
        family: AF_INET or AF_INET6, a dual-stack socket being the latter.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    found = Ports().at(protocol, family, port)
    return {inode: Waiting(each.queued, each.limit) for inode, each in found.items()}


class Bound(Waiting, frozen=True):
    """What waits in a socket, and how it is bound.

    Args:
        is_connected: over UDP, it is connected to a peer.
        device: index of the network interface it is bound to; 0 if to none.
    """

    is_connected: bool = False
    device: int = 0


class Listener(Waiting, frozen=True, kw_only=True):
    """A TCP listener, or a UDP socket that is not connected.

    Args:
        address: the address that it is bound to, as inet_pton(3) packs it.
        device: the index of the network interface that it is bound to; 0: none.
        uid: the user who made it.
        cookie: the kernel's number of the socket, which is never used again.
        cgroup: the inode of the cgroup v2 in which it was made; 0: unknown (before Linux 5.9).
    """

    inode: int
    address: bytes
    device: int
    uid: int
    cookie: int
    cgroup: int


def listeners(family: int, port: int, protocol: str = "tcp") -> list[Listener]:
    """The TCP listeners, or the UDP sockets that are not connected, at a port.

    Raises:
        KernelError
    """
    asking = _UNCONNECTED if protocol == "udp" else _LISTENING
    found = []
    for answer in inet_diag.whole_dump(family, *asking[:2], port, asking[2]):
        for _, content in inet_diag.messages(memoryview(answer)):
            _, _, _, here, _, device, queued, limit, uid, inode = inet_diag.fields(content)
            if memory := inet_diag.attribute(content, asking[2]):
                queued, limit = _MEMORY.unpack_from(memory)
            cgroup = inet_diag.attribute(content, inet_diag.CGROUP_ID)
            found.append(
                Listener(
                    queued,
                    limit,
                    inode=inode,
                    address=here[: 4 if family == socket.AF_INET else 16],
                    device=device,
                    uid=uid,
                    cookie=inet_diag.cookie(content),
                    cgroup=int.from_bytes(cgroup, sys.byteorder),
                )
            )
    return found


_LISTENING = socket.IPPROTO_TCP, 1 << _LISTEN, 0
_UNCONNECTED = socket.IPPROTO_UDP, 1 << _CLOSE, inet_diag.SKMEMINFO
"""Protocol, states, and the attribute to ask for."""


class Ports:
    """Looks repeatedly at the TCP listeners or UDP sockets bound to a port.

    If the kernel's answer is the same as before it is not parsed again: for a thousand idle
    listeners, parsing would take several times as long as asking.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, int, int], tuple[list[bytes], dict[int, Bound]]] = {}

    def at(self, protocol: str, family: int, port: int) -> dict[int, Bound]:
        """The sockets by inode, as in `waiting`. If nothing has changed, the same object as before.

        Raises:
            KernelError: the kernel, or a filter, does not let us ask.
        """
        key = (protocol, family, port)
        answers = inet_diag.whole_dump(*_asking_for(*key))
        before, found = self._last.get(key, ([], {}))
        if answers != before:
            found = dict(_bound(protocol, answers))
            self._last[key] = (answers, found)
        return found


def _asking_for(protocol: str, family: int, port: int) -> tuple[int, int, int, int, int]:
    """The arguments for `inet_diag.whole_dump`."""
    if protocol == "tcp":
        return family, socket.IPPROTO_TCP, 1 << _LISTEN, port, 0
    return family, socket.IPPROTO_UDP, _UDP_STATES, port, inet_diag.SKMEMINFO


def _bound(protocol: str, answers: Iterable[bytes]) -> Iterator[tuple[int, Bound]]:
    if protocol == "tcp":
        for answer in answers:
            for inode, queued, limit, device in inet_diag.listeners(answer):
                yield inode, Bound(queued, limit, False, device)
    else:
        for one in inet_diag.records(answers, inet_diag.SKMEMINFO):
            queued, limit = _MEMORY.unpack_from(one.extension)
            yield one.inode, Bound(queued, limit, one.state == _ESTABLISHED, one.device)


def connected(family: int, address: str, port: int, device: int) -> bool:
    """Whether there is a UDP socket that is bound to an address and connected to a peer. A socket
    that is connected to itself does not count: it is an anchor that was taken out of its group.

    Args:
        device: index of the network interface that it is bound to; 0 if to none.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    here = socket.inet_pton(family, address.partition("%")[0])
    answers = inet_diag.dump(family, socket.IPPROTO_UDP, 1 << _ESTABLISHED, port, 0)
    return any(
        each.address[: len(here)] == here
        and each.device == device
        and each.inode
        and not each.is_its_own_peer
        for each in inet_diag.records(answers, 0)
    )


def connections(family: int, port: int, most: int) -> list[Connection]:
    """The TCP connections that were accepted at a port, in no particular order.

    Args:
        most: how many at most.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    states = 1 << _ESTABLISHED | 1 << _CLOSE_WAIT
    answers = inet_diag.dump(family, socket.IPPROTO_TCP, states, port, inet_diag.INFO)
    # a connection without an inode waits to be accepted
    accepted = (
        Connection(each.inode, each.rqueue, sum(_BYTES.unpack_from(each.extension)) - each.rqueue)
        for each in inet_diag.records(answers, inet_diag.INFO)
        if each.inode
    )
    return list(islice(accepted, most))


class Server(msgspec.Struct, frozen=True):
    """A TCP listener or a bound UDP socket.

    Args:
        address: the numeric address that it is bound to.
        inode: 0 if no process has a descriptor of it.
        queued, limit: TCP: connections, and the backlog; UDP: bytes, and the receive buffer.
        drops: None before Linux 4.9.
        cgroup: number of the cgroup in which it was created; None before Linux 5.8.
    """

    protocol: str
    address: str
    port: int
    device: int
    inode: int
    cookie: int
    uid: int
    queued: int
    limit: int
    drops: int | None
    cgroup: int | None
    is_v6only: bool
    is_connected: bool


def servers(protocol: str) -> Iterator[Server]:
    """All servers of this network namespace, including those of other users.

    Args:
        protocol: "tcp" or "udp".

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    number, states = _PROTOCOLS[protocol]
    for family in (socket.AF_INET, socket.AF_INET6):
        for answer in inet_diag.dump(family, number, states, 0, inet_diag.SKMEMINFO):
            for kind, content in inet_diag.messages(memoryview(answer)):
                if kind == inet_diag.DONE:
                    break
                yield _server(protocol, content)


_PROTOCOLS = {
    "tcp": (socket.IPPROTO_TCP, 1 << _LISTEN),
    "udp": (socket.IPPROTO_UDP, _UDP_STATES),
}


def _server(protocol: str, content: memoryview) -> Server:
    family, state, ports, here, _, device, queued, limit, uid, inode = inet_diag.fields(content)
    memory = inet_diag.attribute(content, inet_diag.SKMEMINFO)
    words = memory.cast("I") if memory else ()
    if protocol == "udp" and words:
        queued, limit = words[:2]
    v6only = inet_diag.attribute(content, inet_diag.SKV6ONLY)
    cgroup = inet_diag.attribute(content, inet_diag.CGROUP_ID)
    return Server(
        protocol=protocol,
        address=socket.inet_ntop(family, here[: 4 if family == socket.AF_INET else 16]),
        port=int.from_bytes(ports[:2], "big"),
        device=device,
        inode=inode,
        cookie=inet_diag.cookie(content),
        uid=uid,
        queued=queued,
        limit=limit,
        drops=words[_SK_MEMINFO_DROPS] if len(words) > _SK_MEMINFO_DROPS else None,
        cgroup=int.from_bytes(cgroup, sys.byteorder) if cgroup else None,
        is_v6only=bool(v6only and v6only[0]),
        is_connected=protocol == "udp" and state == _ESTABLISHED,
    )
