"""Looks for, and undoes through a duplicate, what lets a socket bypass the program of its group."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache

from steer.config.address import Bind
from steer.errors import KernelError
from steer.policy import classic
from steer.sockets import group_program, sock_diag

_SO_BINDTOIFINDEX = 62  # include/uapi/asm-generic/socket.h
_NOBODY: Mapping[int, Sequence[str]] = {
    socket.AF_INET: ("192.0.2.1", "127.0.0.1"),
    socket.AF_INET6: ("2001:db8::1", "::1"),
}
"""Addresses that no machine has (RFC 5737, RFC 3849); without a route to them, loopback."""
_DISCARD = 9
"""A port from which no datagrams come."""


def usual_device() -> int:
    """Index of the network interface that new sockets of this process are bound to; 0 if to none.
    In the cgroup of a VRF (`ip vrf exec`) they are bound to one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)


def drops(sock: socket.socket) -> int:
    """How many datagrams for this socket were dropped."""
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * (_SK_MEMINFO_DROPS + 1))
    return int.from_bytes(raw[-4:], sys.byteorder)


_SO_MEMINFO = 55  # include/uapi/asm-generic/socket.h
_SK_MEMINFO_DROPS = 8  # include/uapi/linux/sock_diag.h


@cache
def connected_stay() -> bool:
    """Whether a UDP socket stays in its group when it is connected, as before Linux 6.13; see
    udp_lib_hash4() of net/ipv4/udp.c.

    This is tried with a socket: to one that is in no group no program can be attached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind(("127.0.0.1", 0))
            sock.connect(("127.0.0.1", _DISCARD))
            group_program.attach_cbpf(sock.fileno(), list(classic.NOTHING))
        except KernelError as error:
            return error.errno != errno.EINVAL
        except OSError:
            return False  # not known, as there is no loopback interface
    return True


def has_connected(bind: Bind) -> bool:
    """Whether a process has a connected UDP socket at the address of a bind, on the interface that
    new sockets are bound to. False if the kernel does not say."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    try:
        return sock_diag.connected(family, bind.address, bind.port, usual_device())
    except KernelError:
        return False


def shares(sock: socket.socket) -> bool:
    """Whether a socket has SO_REUSEPORT. If a worker has cleared it, the kernel may find this
    socket before the group, and then runs no program."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))


def share(sock: socket.socket) -> None:
    """Set SO_REUSEPORT again. Nothing else is needed, as the socket never left its group."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def cut_off(sock: socket.socket) -> bool:
    """Let a UDP socket that is in no group receive nothing more. What it has received can be read.

    Outside its group the kernel may find the socket first, so that it gets everything. Here it is
    connected to an address that sends nothing. That can be undone by connect(2), closes nothing,
    and loses no datagram. If the socket is bound to a wildcard, an answer that its owner still
    sends may have the source address of this route.

    Returns:
        Whether it was connected; False if there is no route.
    """
    for address in _NOBODY[sock.family]:
        with suppress(OSError):
            sock.connect((address, _DISCARD))
            return True
    return False
