"""Sockets of a group: made, checked for, given a program."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress

import msgspec

from steer import abi, features, values
from steer.config import socket_options
from steer.config.address import COPIES, Bind
from steer.config.socket_options import Setting
from steer.errors import BindError, KernelError, errno_name
from steer.linux import port_holders, services
from steer.policy import classic
from steer.sockets import sock_diag, sockopt


def member(
    bind: Bind,
    backlog: int,
    bound: Callable[[int], None] = lambda fd: None,
    settings: Sequence[Setting] = (),
    anchored: bool = False,
) -> socket.socket:
    """A new socket of the group at `bind`; over TCP it listens.

    Args:
        bound: told the descriptor before anything can come in.
        settings: its options; accepted sockets have them, too.
        anchored: join the group that an `anchor` is in.

    Raises:
        OSError: as bind(2) and listen(2) say, or `sockopt.Refused`; see `bind_error`.
    """
    sock = _socket(bind)
    try:
        sockopt.apply(sock, socket_options.of(settings, bind.protocol))
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
    """A UDP socket that later ones join the group through (`member`, with `anchored`); it takes
    nothing in.

    A socket that is bound joins the group of the first socket it finds that has the same
    address, user and interface, and no other socket of the group can be named
    (udp_reuseport_add_sock() of net/ipv4/udp.c). Servers that open a connected socket for a
    client, with SO_REUSEPORT and at the same address, as those of DTLS do, have it found
    first; since Linux 6.13 such a socket is in no group, so the two make a group of their own,
    without a program, and the newcomer gets all datagrams of new clients. So ours are told
    apart by their interface: all are bound to the loopback, where they find the anchor, which
    stays bound to it. Then they are released from it: by connect(2) to AF_UNSPEC
    (__udp_disconnect()), as with another SO_BINDTOIFINDEX they would leave the group.

    Raises:
        OSError: as bind(2) says; EPERM before Linux 5.7 without CAP_NET_RAW.
    """
    sock = _socket(bind)
    try:
        _take_nothing(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _LOOPBACK)
        sock.bind((bind.address, bind.port))
    except BaseException:
        sock.close()
        raise
    return sock


_LOOPBACK = 1
"""LOOPBACK_IFINDEX of include/net/net_namespace.h: its number in every network namespace."""


def take_out(anchor: socket.socket) -> None:
    """Have it leave its group at once, whoever else has it open, and be found by nobody.

    Raises:
        OSError
    """
    _leave_device(anchor)
    # Whatever it is set to, where it was not bound to one: sock_bindtoindex() of net/core/sock.c.
    anchor.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, 0)
    anchor.connect(anchor.getsockname())


def _leave_device(sock: socket.socket) -> None:
    """Raises OSError."""
    nowhere = socket.AF_UNSPEC.to_bytes(2, sys.byteorder) + bytes(14)
    if _LIBC.connect(sock.fileno(), nowhere, len(nowhere)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _take_nothing(sock: socket.socket) -> None:
    """By a classic socket filter that keeps no byte, see socket(7)."""
    code = ctypes.create_string_buffer(classic.pack(classic.NOTHING))
    head = _Fprog(len(classic.NOTHING), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(head))


def check_free(bind: Bind, settings: Sequence[Setting] = ()) -> None:
    """Make sure that nobody is on the port: with SO_REUSEPORT another process of the
    same user would be joined without a word.

    Raises:
        BindError: somebody is, or the address or an option cannot be had.
    """
    if bind.protocol == "udp" and bind.ipv4 and _is_broadcast(bind.ipv4):
        cause = f"a broadcast address of this machine: {COPIES}"
        raise BindError(f"bind {bind.label}", cause, "choose another address")
    try:
        with _socket(bind) as sock:
            sockopt.apply(sock, socket_options.of(settings, bind.protocol))
            sock.bind((bind.address, bind.port))
    except OSError as error:
        raise bind_error(bind, error) from None


def with_port(bind: Bind) -> Bind:
    """The same with a port that is free now, if it has port 0.

    Raises:
        BindError: the address cannot be had.
    """
    if bind.port:
        return bind
    try:
        with _socket(bind) as sock:
            sock.bind((bind.address, 0))
            return msgspec.structs.replace(bind, port=sock.getsockname()[1])
    except OSError as error:
        raise bind_error(bind, error) from None


def _is_broadcast(address: str) -> bool:
    """Whether an IPv4 address is the broadcast address of a network of ours, as the kernel's
    routes have it (/proc/net/fib_trie)."""
    here = False
    with suppress(OSError), open("/proc/net/fib_trie") as lines:
        for line in lines:
            node = line.strip()
            if node.startswith("|-- "):
                here = node[4:] == address
            elif here and node.endswith("BROADCAST"):
                return True
    return False


def refuse_strangers(bind: Bind, ours: frozenset[int]) -> None:
    """Make sure that only we are in a group.

    Args:
        ours: inodes of our sockets.

    Raises:
        BindError: somebody else is.
    """
    # That takes long where there are many processes and connections, and most often nobody is.
    if _are_all(bind, ours):
        return
    others = port_holders.holders(_protocol(bind), bind.address, bind.port, ours=ours)
    strangers = [one for one in others if one.address == bind.address]
    if strangers:
        names = ", ".join(sorted({str(one) for one in strangers}))
        raise BindError(f"bind {bind.label}", f"{names} joined it too", "stop that first")


def _are_all(bind: Bind, ours: frozenset[int]) -> bool:
    """Whether these are known to be all that is bound to its port and not connected."""
    ports, there = sock_diag.Ports(), set[int]()
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            found = ports.at(bind.protocol, family, bind.port)
            there |= {inode for inode, each in found.items() if not each.is_connected}
    except KernelError:
        return False
    return there <= ours


def _protocol(bind: Bind) -> port_holders.Protocol:
    return "udp" if bind.protocol == "udp" else "tcp"


def bind_error(bind: Bind, error: OSError) -> BindError:
    """What a failed `member` means, and who is in the way."""
    if isinstance(error, sockopt.Refused):
        return sockopt.error_of(bind, error)
    act = f"bind {bind.label}"
    if error.errno == errno.EADDRINUSE:
        cause, cure = _in_use(errno_name(error), holders(bind))
        return BindError.from_oserror(act, error, cure=cure, cause=cause)
    cures = {
        errno.EACCES: "ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE: "
        "run as root, or choose a higher port",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EAFNOSUPPORT: "IPv6 is off on this machine",
    }
    return BindError.from_oserror(act, error, cures)


def holders(bind: Bind) -> list[port_holders.Holder]:
    """Who holds a port; see `port_holders.holders`."""
    return port_holders.holders(_protocol(bind), bind.address, bind.port)


def is_held(bind: Bind) -> bool:
    """Whether anybody may hold its address. Asked of the kernel by a bind, as its table of sockets
    takes milliseconds to read, however few there are."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    kind = socket.SOCK_DGRAM if bind.protocol == "udp" else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind) as sock:
            sock.bind((bind.address, bind.port))
    except OSError:
        return True
    return False


def _in_use(name: str, found: Sequence[port_holders.Holder]) -> tuple[str, str]:
    """Cause and cure: of a service of ours it is not a process that is to be stopped."""
    if not found:
        return f"{name}, in use", "stop it, or choose another port"
    by = ", ".join(sorted({str(one) for one in found}))
    named = sorted({of for one in found if one.pid and (of := services.name_of(one.pid))})
    if not named:
        return f"{name}, in use by {by}", "stop it, or choose another port"
    whose = ", ".join(repr(each) for each in named)
    commands = " and ".join(f"`steer stop {each}`" for each in named)
    return f"{name}, in use by {by}, of service {whose}", f"{commands}, or choose another port"


def tcp_migrate_req() -> bool | None:
    """Whether the kernel itself moves what waits at a closing listener to another of the
    group (ip-sysctl.rst, tcp_migrate_req); None before Linux 5.14, where nobody can, though
    Debian's 5.10.262 has such a file.

    Raises:
        KernelError: it cannot be read, as where /proc is mounted with subset=pid.
    """
    if features.MIGRATE.is_newer_than(os.uname().release):
        return None
    path = "/proc/sys/net/ipv4/tcp_migrate_req"
    try:
        with open(path) as stream:
            return stream.read().strip() == "1"
    except OSError as error:
        cures = {errno.ENOENT: "mount /proc without subset=pid"}
        raise KernelError.from_oserror(f"read {path}", error, cures) from None


def scratch() -> socket.socket:
    """A socket that is bound nowhere, to try on what a group would be given."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock


def attach_ebpf(sock: int, program: int) -> None:
    """Make `program` that of the whole group `sock` is in, at once for all of it.

    Raises:
        KernelError
    """
    value = program.to_bytes(4, sys.byteorder)
    _set(sock, abi.SO_ATTACH_REUSEPORT_EBPF, value, "attach eBPF program")


def attach_cbpf(sock: int, program: list[classic.Insn]) -> None:
    """The same for a classic program, for which no privilege is needed.

    Raises:
        KernelError
    """
    code = ctypes.create_string_buffer(classic.pack(program))
    head = _Fprog(len(program), ctypes.addressof(code))
    _set(sock, abi.SO_ATTACH_REUSEPORT_CBPF, bytes(head), "attach classic BPF program")


def detach(sock: int) -> None:
    """Leave the group to the kernel's hash; without a program it is already.

    Raises:
        KernelError
    """
    try:
        _set(sock, abi.SO_DETACH_REUSEPORT_BPF, bytes(4), "detach the group's program")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise


def cookie(fd: int) -> int:
    """What names the socket as long as the machine is up, see SO_COOKIE in socket(7)."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


_SO_ATTACH_FILTER, _SO_LOCK_FILTER, _SO_COOKIE, _SO_BINDTOIFINDEX = 26, 44, 57, 62
"""include/uapi/asm-generic/socket.h"""


class Locked(KernelError):
    """A member of the group has SO_LOCK_FILTER, see socket(7): no program can be attached
    through it. Through another one it can, and detached through any."""


def locked(act: str, workers: Sequence[int] = ()) -> Locked:
    """The error for it.

    Args:
        act: what was to be done.
        workers: the slots of the members that have it; none: not known.
    """
    whose = values.several("worker", workers) if workers else "a worker"
    owned = "their sockets" if len(workers) > 1 else "its socket"
    cause = f"EPERM, as {whose} set SO_LOCK_FILTER on {owned}"
    cure = "leave one socket of the group without it, or restart that worker"
    return Locked(act, cause, cure, errno=errno.EPERM)


class NoMember(KernelError):
    """Not through a socket that is bound and in no group (reuseport_attach_prog() of
    net/core/sock_reuseport.c)."""


def is_locked(sock: int) -> bool:
    """Whether no program can be attached to its group through it."""
    with socket.socket(fileno=os.dup(sock)) as member_of:
        return bool(member_of.getsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER))


def unlocked(members: Sequence[int]) -> int:
    """One of the sockets of a group that a program can be attached through; else the first."""
    return next((fd for fd in members if not is_locked(fd)), members[0])


_LIBC = ctypes.CDLL(None, use_errno=True)


class _Fprog(ctypes.Structure):
    """Mirrors struct sock_fprog of include/uapi/linux/filter.h."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _socket(bind: Bind) -> socket.socket:
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    if bind.protocol == "udp":
        return socket.socket(family, socket.SOCK_DGRAM)
    sock = socket.socket(family, socket.SOCK_STREAM)
    # Connections of the last run in TIME_WAIT must not keep this one from starting.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def refuse_locked(members: Iterable[socket.socket]) -> None:
    """Raises Locked: no program can be attached through one of them."""
    for sock in members:
        if is_locked(sock.fileno()):
            raise locked("attach a program")


def _set(fd: int, option: int, value: bytes, act: str) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, value)
        except OSError as error:
            if error.errno == errno.EPERM and is_locked(fd):
                raise locked(act) from None
            if error.errno == errno.EINVAL and sock.getsockname()[1]:
                raise NoMember.from_oserror(act, error) from None
            cures = {errno.EPERM: "needs CAP_BPF, or the program's owner"}
            raise KernelError.from_oserror(act, error, cures) from None


def duplicates(own: Iterable[socket.socket]) -> list[int]:
    """Another descriptor of each; all or none.

    Raises:
        KernelError: there is none left.
    """
    with ExitStack() as undo:
        made = [undo.enter_context(duplicate(sock.fileno())) for sock in own]
        undo.pop_all()
    return [sock.detach() for sock in made]


def duplicate(fd: int) -> socket.socket:
    """Another descriptor of the same socket.

    Raises:
        KernelError: there is none left.
    """
    try:
        return socket.socket(fileno=os.dup(fd))
    except OSError as error:
        cure = "raise the limit on open files"
        raise KernelError.from_oserror("duplicate a socket", error, cure=cure) from None
