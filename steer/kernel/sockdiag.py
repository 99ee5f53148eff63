"""What sock_diag(7) tells of sockets by their port: their queues, what their connections move, and
how they are bound.

No descriptor of them is needed, and no privilege: it asks for no ptrace(2) access to whoever has
them open, and a thousand listeners take a millisecond. For the controller, which cannot afford to
import pyroute2; `diag` is for the short-lived commands.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import msgspec

from steer.errors import KernelError
from steer.kernel.listeners import Waiting

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
_ATTRIBUTE = struct.Struct("=HH")
_INET_DIAG_INFO, _INET_DIAG_SKMEMINFO = 2, 7
_MEMORY = struct.Struct("=II")
"""SK_MEMINFO_RMEM_ALLOC and _RCVBUF of linux/sock_diag.h."""
_BYTES = struct.Struct("=120xQQ")
"""tcpi_bytes_acked and tcpi_bytes_received of struct tcp_info, linux/tcp.h."""
_ESTABLISHED, _CLOSE, _CLOSE_WAIT, _LISTEN = 1, 7, 8, 10  # include/net/tcp_states.h
_UDP_STATES = 1 << _CLOSE | 1 << _ESTABLISHED
"""An open UDP socket is in the former unless it is connected."""
_CHUNK_BYTES = 1 << 17
_DEAF_S = 1.0
"""The kernel answers at once; a filter that drops what it does not know may not."""


class Connection(msgspec.Struct, frozen=True):
    """One that a process has accepted.

    Args:
        inode: see `proc.socket_inode`.
        unread: bytes that wait to be read.
        moved: bytes read from it and acknowledged of it so far.
    """

    inode: int
    unread: int
    moved: int


def waiting(protocol: str, family: int, port: int) -> dict[int, Waiting]:
    """What waits in the TCP listeners or UDP sockets bound to a port, by socket inode; of this
    network namespace. One that does not listen is not there.

    Args:
        protocol: "tcp" or "udp".
        family: AF_INET or AF_INET6, a dual-stack socket being the latter.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    if protocol == "tcp":
        states = 1 << _LISTEN
        found = _dump(family, socket.IPPROTO_TCP, states, port)
        return {each.inode: Waiting(each.rqueue, each.wqueue) for each in found}
    found = _dump(family, socket.IPPROTO_UDP, _UDP_STATES, port, _INET_DIAG_SKMEMINFO)
    return {each.inode: Waiting(*_MEMORY.unpack_from(each.extension)) for each in found}


class Standing(msgspec.Struct, frozen=True):
    """How a socket is bound.

    Args:
        is_connected: over UDP: to one peer.
        device: index of the network interface; 0: to none.
        queued: what waits in it, see `Waiting`.
    """

    is_connected: bool
    device: int
    queued: int


def standing(protocol: str, family: int, port: int) -> dict[int, Standing]:
    """Of the TCP listeners or UDP sockets bound to a port, by socket inode; as `waiting`.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    over_tcp = protocol == "tcp"
    states = 1 << _LISTEN if over_tcp else _UDP_STATES
    number = socket.IPPROTO_TCP if over_tcp else socket.IPPROTO_UDP
    return {
        each.inode: Standing(each.state == _ESTABLISHED, each.device, each.rqueue)
        for each in _dump(family, number, states, port)
    }


def connected(family: int, address: str, port: int, device: int) -> bool:
    """Whether there is a UDP socket that is bound there, and connected to a peer. One that is
    connected to itself is an anchor that was taken out of its group.

    Args:
        device: index of the network interface that it is bound to; 0: to none.

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
    """The TCP connections that were accepted at a port, in no order.

    Args:
        most: no more than these.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
    """
    states = 1 << _ESTABLISHED | 1 << _CLOSE_WAIT
    seen = _dump(family, socket.IPPROTO_TCP, states, port, _INET_DIAG_INFO)
    # those without an inode wait to be accepted
    accepted = (
        Connection(each.inode, each.rqueue, sum(_BYTES.unpack_from(each.extension)) - each.rqueue)
        for each in seen
        if each.inode
    )
    return list(islice(accepted, most))


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
    """Each socket, with the extension asked for.

    Raises:
        KernelError
    """
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
                answer = memoryview(asking.recv(_CHUNK_BYTES))
                for kind, content in _messages(answer):
                    if kind == _NLMSG_DONE:
                        return
                    _, state, ports, here, there, device, rqueue, wqueue, _, inode = (
                        _MESSAGE.unpack_from(content)
                    )
                    is_own = here == there and ports[:2] == ports[2:]
                    more = _attribute(content, extension)
                    yield _Found(state, here, is_own, device, rqueue, wqueue, inode, more)
    except OSError as error:
        cause = errno.errorcode.get(error.errno or 0, str(error))
        raise KernelError("ask for the queues of sockets", cause, _CURES.get(cause, "")) from None


_CURES = {
    "EAFNOSUPPORT": "allow AF_NETLINK (systemd: RestrictAddressFamilies=)",
    "EPERM": "allow AF_NETLINK sockets in the seccomp filter",
    "ENOENT": "a kernel with CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG",
}


def _messages(answer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each. Raises OSError: the kernel refuses."""
    while len(answer) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(answer)
        content = answer[_HEADER.size : length]
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", content)[0]
            raise OSError(number, os.strerror(number))
        yield kind, content
        answer = answer[_aligned(length) :]


def _attribute(content: memoryview, wanted: int) -> memoryview:
    """The data of one attribute; none where it is not there."""
    rest = content[_MESSAGE.size :] if wanted else content[:0]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == wanted:
            return rest[_ATTRIBUTE.size : length]
        rest = rest[_aligned(length) :]
    return rest[:0]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
