"""What sock_diag(7) tells of sockets by their port: their queues, what their connections move, and
how they are bound.

No descriptor of them is needed, and no privilege: it asks for no ptrace(2) access to whoever has
them open, and a thousand listeners take a millisecond.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
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
_ATTRIBUTE = struct.Struct("=HH")
_INET_DIAG_INFO, _INET_DIAG_SKMEMINFO = 2, 7
_MEMORY = struct.Struct("=II")
"""SK_MEMINFO_RMEM_ALLOC and _RCVBUF of linux/sock_diag.h."""
_BYTES = struct.Struct("=120xQQ")
"""tcpi_bytes_acked and tcpi_bytes_received of struct tcp_info, linux/tcp.h."""
_ESTABLISHED, _CLOSE, _CLOSE_WAIT, _LISTEN = 1, 7, 8, 10  # include/net/tcp_states.h
_UDP_STATES = 1 << _CLOSE | 1 << _ESTABLISHED
"""An open UDP socket is in the former unless it is connected."""
_DONE_BYTES = _HEADER.size + 4
_CHUNK_BYTES = 1 << 17
_DEAF_S = 1.0
"""The kernel answers at once; a filter that drops what it does not know may not."""


class Connection(msgspec.Struct, frozen=True):
    """One that a process has accepted.

    Args:
        inode: see `processes.socket_inode`.
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
    found = Ports().at(protocol, family, port)
    return {inode: Waiting(each.queued, each.limit) for inode, each in found.items()}


class Bound(Waiting, frozen=True):
    """What waits in a socket, and how it is bound.

    Args:
        is_connected: over UDP: to one peer.
        device: index of the network interface; 0: to none.
    """

    is_connected: bool = False
    device: int = 0


class Ports:
    """The TCP listeners or UDP sockets bound to a port, looked at again and again.

    Where the kernel answers with the same bytes as before, they are not read anew: for a thousand
    listeners that nobody uses reading would take several times as long as the answer.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, int, int], tuple[list[bytes], dict[int, Bound]]] = {}

    def at(self, protocol: str, family: int, port: int) -> dict[int, Bound]:
        """By socket inode; as `waiting`. The same object as before if nothing has changed.

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
    """What `_answers` is to be called with."""
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
    """All are alike, so all their messages are as long, and can be read at once."""
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
"""Of `_HEADER` and `_MESSAGE`, as far as they are read: length, type, id.idiag_if, rqueue, wqueue,
inode."""
_LISTENER_BYTES = struct.calcsize(_LISTENER)


def _one_by_one(answer: bytes) -> Iterator[tuple[int, Bound]]:
    for one in _found([answer], 0):
        yield one.inode, Bound(one.rqueue, one.wqueue, False, one.device)


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
    return _found(_ask(family, protocol, states, port, extension), extension)


def _answers(family: int, protocol: int, states: int, port: int, extension: int) -> list[bytes]:
    """All that the kernel says, but for the message that ends it. Raises KernelError."""
    *answers, last = _ask(family, protocol, states, port, extension)
    kinds = [kind for kind, _ in _messages(memoryview(last))]
    return answers if kinds == [_NLMSG_DONE] else [*answers, last]


def _ask(family: int, protocol: int, states: int, port: int, extension: int) -> Iterator[bytes]:
    """What the kernel says of the sockets at a port, in parts. Raises KernelError."""
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
    """Whether a dump ends with it: with a message that stands alone (netlink_dump() of
    net/netlink/af_netlink.c), or comes after what still found room. Raises OSError: a refusal."""
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
