"""What takes a socket past the program of its group, seen and undone through a duplicate."""

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
"""Addresses that nobody has (RFC 5737, RFC 3849), and where there is no route to them our own."""
_DISCARD = 9
"""A port that nobody sends from."""


def usual_device() -> int:
    """Index of the network interface that new sockets of ours are bound to, 0 for none: those of
    a VRF's cgroup (`ip vrf exec`) are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)


def drops(sock: socket.socket) -> int:
    """Datagrams that it was given and did not take in."""
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * (_SK_MEMINFO_DROPS + 1))
    return int.from_bytes(raw[-4:], sys.byteorder)


_SO_MEMINFO = 55  # include/uapi/asm-generic/socket.h
_SK_MEMINFO_DROPS = 8  # include/uapi/linux/sock_diag.h


@cache
def connected_stay() -> bool:
    """Whether a UDP socket stays in its group when it is connected: before Linux 6.13, see
    udp_lib_hash4() of net/ipv4/udp.c. To one in no group no program can be attached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind(("127.0.0.1", 0))
            sock.connect(("127.0.0.1", _DISCARD))
            group_program.attach_cbpf(sock.fileno(), list(classic.NOTHING))
        except KernelError as error:
            return error.errno != errno.EINVAL
        except OSError:
            return False  # it cannot be told, and there is no loopback
    return True


def has_connected(bind: Bind) -> bool:
    """Whether a process has a connected UDP socket there, on the interface of new sockets of ours;
    where the kernel does not tell, no."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    try:
        return sock_diag.connected(family, bind.address, bind.port, usual_device())
    except KernelError:
        return False


def shares(sock: socket.socket) -> bool:
    """Whether it has SO_REUSEPORT. Where that was taken back the kernel may find this one socket
    before its group, and then asks no program."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))


def share(sock: socket.socket) -> None:
    """Set it again, which is all that is needed: it never left the group."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def cut_off(sock: socket.socket) -> bool:
    """Have a UDP socket that is in no group get nothing more; what is in it can still be read.

    Outside its group it may be found before it, and get everything. It is connected to somebody
    who sends nothing: that is undone by connect(2), closes nothing, and loses no datagram. An
    answer that its owner still sends over a socket bound to a wildcard may go out with the
    address that this route has.

    Returns:
        Whether it was; it is not where there is no route.
    """
    for address in _NOBODY[sock.family]:
        with suppress(OSError):
            sock.connect((address, _DISCARD))
            return True
    return False
