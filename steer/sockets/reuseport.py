"""Sockets of a reuseport group: made, duplicated, and taken out of the group."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from steer.config import socket_options
from steer.config.address import Bind
from steer.config.socket_options import Setting
from steer.errors import KernelError
from steer.policy import classic
from steer.sockets import group_program, sockopt

_SO_ATTACH_FILTER, _SO_COOKIE, _SO_BINDTOIFINDEX = 26, 57, 62
"""include/uapi/asm-generic/socket.h"""
_LOOPBACK = 1
"""LOOPBACK_IFINDEX of include/net/net_namespace.h: its number in every network namespace."""


def member(
    bind: Bind,
    backlog: int,
    bound: Callable[[int], None] = lambda fd: None,
    settings: Sequence[Setting] = (),
    anchored: bool = False,
) -> socket.socket:
    """Make a socket that joins the group at `bind`; over TCP it listens.

    Args:
        bound: called with the descriptor before any connection or datagram can arrive.
        settings: socket options, which accepted sockets inherit.
        anchored: join the group of an `anchor`.

    Raises:
        OSError: bind(2) or listen(2) failed, or `sockopt.Refused`; see
            `port_checks.bind_error`.
    """
    sock = new_socket(bind)
    try:
        sockopt.apply(sock, socket_options.for_protocol(settings, bind.protocol))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if anchored:
            sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _LOOPBACK)
        sock.bind((bind.address, bind.port))
        if anchored:
            _leave_device(sock)
        bound(sock.fileno())
        if bind.protocol == "tcp":
            sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def anchor(bind: Bind) -> socket.socket:
    """Make a UDP socket through which later ones join its group (`member`, with `anchored`). It
    receives nothing.

    bind(2) puts a socket into the group of the first socket that the kernel finds with the same
    address, user and interface (udp_reuseport_add_sock() of net/ipv4/udp.c). No caller can say
    which group it means. Some servers, as those of DTLS, open a connected socket for each client,
    with SO_REUSEPORT and at the same address, and the kernel finds that socket first. Since Linux
    6.13 a connected socket is in no group: then the two sockets form a new group without a
    program, and the new socket gets all datagrams of new clients.

    So steer uses the interface to find the right group. Each new socket is bound to the loopback
    interface, where the kernel finds the anchor, which stays bound to it. After that the new
    socket is released from the interface by connect(2) to AF_UNSPEC (__udp_disconnect()), as
    another SO_BINDTOIFINDEX would make it leave the group.

    Raises:
        OSError: bind(2) failed; EPERM before Linux 5.7 without CAP_NET_RAW.
    """
    sock = new_socket(bind)
    try:
        _take_nothing(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _LOOPBACK)
        sock.bind((bind.address, bind.port))
    except BaseException:
        sock.close()
        raise
    return sock


def take_out(anchor: socket.socket) -> None:
    """Make a UDP socket leave its group at once, even if other processes have it open, and receive
    nothing more.

    Raises:
        OSError
    """
    _leave_device(anchor)
    # This makes it leave its group even if it was bound to no interface, see sock_bindtoindex() of
    # net/core/sock.c.
    anchor.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, 0)
    anchor.connect(anchor.getsockname())


def _leave_device(sock: socket.socket) -> None:
    """Raises OSError."""
    nowhere = socket.AF_UNSPEC.to_bytes(2, sys.byteorder) + bytes(14)
    if _LIBC.connect(sock.fileno(), nowhere, len(nowhere)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_LIBC = ctypes.CDLL(None, use_errno=True)


def _take_nothing(sock: socket.socket) -> None:
    """Attach a socket filter that drops everything, see SO_ATTACH_FILTER in socket(7)."""
    with group_program.sock_fprog(classic.NOTHING) as value:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, value)


def new_socket(bind: Bind) -> socket.socket:
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    if bind.protocol == "udp":
        return socket.socket(family, socket.SOCK_DGRAM)
    sock = socket.socket(family, socket.SOCK_STREAM)
    # Connections of the last run in TIME_WAIT must not keep this one from starting.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def cookie(fd: int) -> int:
    """The number of a socket, unique until the machine is rebooted; see SO_COOKIE in socket(7)."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def duplicates(own: Iterable[socket.socket]) -> list[int]:
    """Duplicate all these sockets, or none.

    Raises:
        KernelError: no descriptor is left.
    """
    with ExitStack() as undo:
        made = [undo.enter_context(duplicate(sock.fileno())) for sock in own]
        undo.pop_all()
    return [sock.detach() for sock in made]


def duplicate(fd: int) -> socket.socket:
    """Duplicate a socket.

    Raises:
        KernelError: no descriptor is left.
    """
    try:
        return socket.socket(fileno=os.dup(fd))
    except OSError as error:
        cure = "raise the limit on open files"
        raise KernelError.from_oserror("duplicate a socket", error, cure=cure) from None
