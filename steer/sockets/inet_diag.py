"""The protocol of sock_diag(7): sends dump requests and parses the messages of the answers.

What callers ask with it is in `sock_diag`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from steer.errors import KernelError

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, DONE = 2, 3
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
"""struct rtattr of linux/rtnetlink.h."""
INFO, SKMEMINFO, SKV6ONLY, CGROUP_ID = 2, 7, 11, 21
"""INET_DIAG_INFO and so on of linux/inet_diag.h: attributes of a message."""
_DONE_BYTES = _HEADER.size + 4
_CHUNK_BYTES = 1 << 17
_DEAF_S = 1.0
"""How long to wait for an answer. The kernel answers at once, unless a filter drops the request."""
_CURES = {
    errno.EAFNOSUPPORT: "allow AF_NETLINK (systemd: RestrictAddressFamilies=)",
    errno.EPERM: "allow AF_NETLINK sockets in the seccomp filter",
    errno.ENOENT: "a kernel with CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG",
}


class SocketRecord(NamedTuple):
    """A socket: fields of struct inet_diag_msg, and the data of one attribute."""

    state: int
    address: bytes
    is_its_own_peer: bool
    device: int
    rqueue: int
    wqueue: int
    inode: int
    extension: memoryview


def dump(family: int, protocol: int, states: int, port: int, extension: int) -> Iterator[bytes]:
    """Ask for the sockets at a port, and yield each answer.

    Args:
        states: the states of the sockets, as a bit mask.
        port: 0: any.
        extension: an attribute to ask for; 0: none.

    Raises:
        KernelError: the kernel, or a filter, does not let us ask.
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
    if all(_HEADER.unpack_from(each)[1] not in (DONE, _NLMSG_ERROR) for each in ends):
        return False
    return any(kind == DONE for kind, _ in messages(memoryview(answer)))


def whole_dump(family: int, protocol: int, states: int, port: int, extension: int) -> list[bytes]:
    """The kernel's answers, without the message that ends a dump. Raises KernelError."""
    *answers, last = dump(family, protocol, states, port, extension)
    kinds = [kind for kind, _ in messages(memoryview(last))]
    return answers if kinds == [DONE] else [*answers, last]


def records(answers: Iterable[bytes], extension: int) -> Iterator[SocketRecord]:
    """Each socket in the answers, with one attribute. Raises OSError: the kernel refuses."""
    for answer in answers:
        for kind, content in messages(memoryview(answer)):
            if kind == DONE:
                return
            _, state, ports, here, there, device, rqueue, wqueue, _, inode = fields(content)
            is_own = here == there and ports[:2] == ports[2:]
            more = attribute(content, extension)
            yield SocketRecord(state, here, is_own, device, rqueue, wqueue, inode, more)


def listeners(answer: bytes) -> Iterator[tuple[int, int, int, int]]:
    """The inode, rqueue, wqueue and device of each TCP listener in an answer.

    Messages of the same length, as those of listeners mostly are, are parsed all at once.
    """
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
        yield inode, queued, limit, device


_LISTENER = "=IH10x4x4x32xI8x4xII4xI"
"""Parts of `_HEADER` and `_MESSAGE`: length, type, id.idiag_if, rqueue, wqueue, inode."""
_LISTENER_BYTES = struct.calcsize(_LISTENER)


def _one_by_one(answer: bytes) -> Iterator[tuple[int, int, int, int]]:
    for one in records([answer], 0):
        yield one.inode, one.rqueue, one.wqueue, one.device


def messages(answer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The type and content of each message. Raises OSError: the kernel refuses."""
    while len(answer) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(answer)
        content = answer[_HEADER.size : length]
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", content)[0]
            raise OSError(number, os.strerror(number))
        yield kind, content
        answer = answer[_aligned(length) :]


def fields(content: memoryview) -> tuple[Any, ...]:
    """See `_MESSAGE`."""
    return _MESSAGE.unpack_from(content)


def cookie(content: memoryview) -> int:
    (found,) = _COOKIE.unpack_from(content, _COOKIE_AT)
    return int(found)


def attribute(content: memoryview, wanted: int) -> memoryview:
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
