"""Asks sock_diag(7) about the sockets at a port: their queues, the bytes of their connections, and
how they are bound.

This takes no descriptor of the sockets, no privilege, and no ptrace(2) access to the processes that
have them open. A thousand listeners take a millisecond.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import msgspec

from steer.errors import KernelError
from steer.sockets.listeners import Waiting

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_DUMP_REQUEST = 0x301
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr of linux/netlink.h."""
_REQUEST = struct.Struct("=BBBxI")
"""The head of struct inet_diag_req_v2 of linux/inet_diag.h: family, protocol, ext, states."""
_ID = struct.Struct("!HH16s16s4s8s")
"""struct inet_diag_sockid: ports in network byte order; a cookie of ones is none."""
_MESSAGE = struct.Struct("=BB2x4s16s16sI8x4xIIII")
"""struct inet_diag_msg: family, state, both ports of id, id.idiag_src, id.idiag_dst, id.idiag_if,
rqueue, wqueue, uid, inode."""
_COOKIE, _COOKIE_AT = struct.Struct("=Q"), 44
"""Its id.idiag_cookie, which `_MESSAGE` passes over."""
_ATTRIBUTE = struct.Struct("=HH")
_INET_DIAG_INFO, _INET_DIAG_SKMEMINFO = 2, 7
_INET_DIAG_SKV6ONLY, _INET_DIAG_CGROUP_ID = 11, 21
_SK_MEMINFO_DROPS = 8
_MEMORY = struct.Struct("=II")
"""SK_MEMINFO_RMEM_ALLOC and _RCVBUF of linux/sock_diag.h."""
_BYTES = struct.Struct("=120xQQ")
"""tcpi_bytes_acked and tcpi_bytes_received of struct tcp_info, linux/tcp.h."""
_ESTABLISHED, _CLOSE, _CLOSE_WAIT, _LISTEN = 1, 7, 8, 10  # include/net/tcp_states.h
_UDP_STATES = 1 << _CLOSE | 1 << _ESTABLISHED
"""A UDP socket is in state 7 (TCP_CLOSE), or in state 1 (TCP_ESTABLISHED) if it is connected."""
_DONE_BYTES = _HEADER.size + 4
_CHUNK_BYTES = 1 << 17
_DEAF_S = 1.0
"""How long to wait for an answer. The kernel answers at once, unless a filter drops the request."""


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
    """A TCP listener.

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


def listeners(family: int, port: int) -> list[Listener]:
    """The TCP listeners at a port. Raises KernelError."""
    found = []
    for answer in _answers(family, socket.IPPROTO_TCP, 1 << _LISTEN, port, 0):
        for _, content in _messages(memoryview(answer)):
            _, _, _, here, _, device, queued, limit, uid, inode = _MESSAGE.unpack_from(content)
            (cookie,) = _COOKIE.unpack_from(content, _COOKIE_AT)
            cgroup = _attribute(content, _INET_DIAG_CGROUP_ID)
            found.append(
                Listener(
                    queued,
                    limit,
                    inode=inode,
                    address=here[: 4 if family == socket.AF_INET else 16],
                    device=device,
                    uid=uid,
                    cookie=cookie,
                    cgroup=int.from_bytes(cgroup, sys.byteorder),
                )
            )
    return found


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
        answers = _answers(*_asking_for(*key))
        before, found = self._last.get(key, ([], {}))
        if answers != before:
            found = dict(_bound(protocol, answers))
            self._last[key] = (answers, found)
        return found


def _asking_for(protocol: str, family: int, port: int) -> tuple[int, int, int, int, int]:
    """The arguments for `_answers`."""
    if protocol == "tcp":
        return family, socket.IPPROTO_TCP, 1 << _LISTEN, port, 0
    return family, socket.IPPROTO_UDP, _UDP_STATES, port, _INET_DIAG_SKMEMINFO


def _bound(protocol: str, answers: Iterable[bytes]) -> Iterator[tuple[int, Bound]]:
    if protocol == "tcp":
        for each in answers:
            yield from _listeners(each)
    else:
        for one in _found(answers, _INET_DIAG_SKMEMINFO):
            queued, limit = _MEMORY.unpack_from(one.extension)
            yield one.inode, Bound(queued, limit, one.state == _ESTABLISHED, one.device)


def _listeners(answer: bytes) -> Iterator[tuple[int, Bound]]:
    """Parse all messages at once: those of listeners mostly have the same length."""
    first_bytes = _HEADER.unpack_from(answer)[0]
    if len(answer) % first_bytes or first_bytes < _LISTENER_BYTES:
        yield from _one_by_one(answer)
        return
    layout = struct.Struct(f"{_LISTENER}{first_bytes - _LISTENER_BYTES}x")
    found = list(layout.iter_unpack(answer))
    if any(length != first_bytes or kind != _SOCK_DIAG_BY_FAMILY for length, kind, *_ in found):
        yield from _one_by_one(answer)
        return
    for _, _, device, queued, limit, inode in found:
        yield inode, Bound(queued, limit, False, device)


_LISTENER = "=IH10x4x4x32xI8x4xII4xI"
"""Parts of `_HEADER` and `_MESSAGE`: length, type, id.idiag_if, rqueue, wqueue, inode."""
_LISTENER_BYTES = struct.calcsize(_LISTENER)


def _one_by_one(answer: bytes) -> Iterator[tuple[int, Bound]]:
    for one in _found([answer], 0):
        yield one.inode, Bound(one.rqueue, one.wqueue, False, one.device)


def connected(family: int, address: str, port: int, device: int) -> bool:
    """Whether there is a UDP socket that is bound to an address and connected to a peer. A socket
    that is connected to itself does not count: it is an anchor that was taken out of its group.

    Args:
        device: index of the network interface that it is bound to; 0 if to none.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    here = socket.inet_pton(family, address.partition("%")[0])
    found = _dump(family, socket.IPPROTO_UDP, 1 << _ESTABLISHED, port)
    return any(
        each.address[: len(here)] == here
        and each.device == device
        and each.inode
        and not each.is_its_own_peer
        for each in found
    )


def connections(family: int, port: int, most: int) -> list[Connection]:
    """The TCP connections that were accepted at a port, in no particular order.

    Args:
        most: how many at most.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    states = 1 << _ESTABLISHED | 1 << _CLOSE_WAIT
    seen = _dump(family, socket.IPPROTO_TCP, states, port, _INET_DIAG_INFO)
    # a connection without an inode waits to be accepted
    accepted = (
        Connection(each.inode, each.rqueue, sum(_BYTES.unpack_from(each.extension)) - each.rqueue)
        for each in seen
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
        for answer in _ask(family, number, states, 0, _INET_DIAG_SKMEMINFO):
            for kind, content in _messages(memoryview(answer)):
                if kind == _NLMSG_DONE:
                    break
                yield _server(protocol, content)


_PROTOCOLS = {
    "tcp": (socket.IPPROTO_TCP, 1 << _LISTEN),
    "udp": (socket.IPPROTO_UDP, _UDP_STATES),
}


def _server(protocol: str, content: memoryview) -> Server:
    family, state, ports, here, _, device, queued, limit, uid, inode = _MESSAGE.unpack_from(content)
    cookie = _COOKIE.unpack_from(content, _COOKIE_AT)[0]
    memory = _attribute(content, _INET_DIAG_SKMEMINFO)
    words = memory.cast("I") if memory else ()
    if protocol == "udp" and words:
        queued, limit = words[:2]
    v6only = _attribute(content, _INET_DIAG_SKV6ONLY)
    cgroup = _attribute(content, _INET_DIAG_CGROUP_ID)
    return Server(
        protocol=protocol,
        address=socket.inet_ntop(family, here[: 4 if family == socket.AF_INET else 16]),
        port=int.from_bytes(ports[:2], "big"),
        device=device,
        inode=inode,
        cookie=cookie,
        uid=uid,
        queued=queued,
        limit=limit,
        drops=words[_SK_MEMINFO_DROPS] if len(words) > _SK_MEMINFO_DROPS else None,
        cgroup=int.from_bytes(cgroup, sys.byteorder) if cgroup else None,
        is_v6only=bool(v6only and v6only[0]),
        is_connected=protocol == "udp" and state == _ESTABLISHED,
    )


class _Found(NamedTuple):
    """A socket: fields of struct inet_diag_msg, and the data of one attribute."""

    state: int
    address: bytes
    is_its_own_peer: bool
    device: int
    rqueue: int
    wqueue: int
    inode: int
    extension: memoryview


def _dump(
    family: int, protocol: int, states: int, port: int, extension: int = 0
) -> Iterator[_Found]:
    """Each socket with one attribute.

    Raises:
        KernelError
    """
    return _found(_ask(family, protocol, states, port, extension), extension)


def _answers(family: int, protocol: int, states: int, port: int, extension: int) -> list[bytes]:
    """The kernel's answers, without the message that ends a dump. Raises KernelError."""
    *answers, last = _ask(family, protocol, states, port, extension)
    kinds = [kind for kind, _ in _messages(memoryview(last))]
    return answers if kinds == [_NLMSG_DONE] else [*answers, last]


def _ask(family: int, protocol: int, states: int, port: int, extension: int) -> Iterator[bytes]:
    """Ask for the sockets at a port, and yield each answer. Raises KernelError."""
    extensions = 1 << (extension - 1) if extension else 0
    body = _REQUEST.pack(family, protocol, extensions, states)
    body += _ID.pack(port, 0, bytes(16), bytes(16), bytes(4), b"\xff" * 8)
    head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP_REQUEST, 1, 0)
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        ) as asking:
            asking.settimeout(_DEAF_S)
            asking.send(head + body)
            while True:
                answer = asking.recv(_CHUNK_BYTES)
                yield answer
                if _is_last(answer):
                    return
    except OSError as error:
        raise KernelError.from_oserror("ask for the queues of sockets", error, _CURES) from None


def _is_last(answer: bytes) -> bool:
    """Whether a dump ends with this answer. The message that ends it is alone in an answer, or
    follows others (netlink_dump() of net/netlink/af_netlink.c). Raises OSError: a refusal."""
    ends = (answer[:_DONE_BYTES], answer[-_DONE_BYTES:])
    if all(_HEADER.unpack_from(each)[1] not in (_NLMSG_DONE, _NLMSG_ERROR) for each in ends):
        return False
    return any(kind == _NLMSG_DONE for kind, _ in _messages(memoryview(answer)))


def _found(answers: Iterable[bytes], extension: int) -> Iterator[_Found]:
    for answer in answers:
        for kind, content in _messages(memoryview(answer)):
            if kind == _NLMSG_DONE:
                return
            _, state, ports, here, there, device, rqueue, wqueue, _, inode = _MESSAGE.unpack_from(
                content
            )
            is_own = here == there and ports[:2] == ports[2:]
            more = _attribute(content, extension)
            yield _Found(state, here, is_own, device, rqueue, wqueue, inode, more)


_CURES = {
    errno.EAFNOSUPPORT: "allow AF_NETLINK (systemd: RestrictAddressFamilies=)",
    errno.EPERM: "allow AF_NETLINK sockets in the seccomp filter",
    errno.ENOENT: "a kernel with CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG",
}


def _messages(answer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The type and content of each message. Raises OSError: the kernel refuses."""
    while len(answer) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(answer)
        content = answer[_HEADER.size : length]
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", content)[0]
            raise OSError(number, os.strerror(number))
        yield kind, content
        answer = answer[_aligned(length) :]


def _attribute(content: memoryview, wanted: int) -> memoryview:
    """The data of one attribute; empty if it is not there."""
    rest = content[_MESSAGE.size :] if wanted else content[:0]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == wanted:
            return rest[_ATTRIBUTE.size : length]
        rest = rest[_aligned(length) :]
    return rest[:0]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
