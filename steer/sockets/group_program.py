"""The program of a reuseport group: attached and detached through any socket of the group."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from steer import abi, values
from steer.errors import KernelError
from steer.policy import classic

_SO_LOCK_FILTER = 44  # include/uapi/asm-generic/socket.h


def attach_ebpf(sock: int, program: int) -> None:
    """Attach an eBPF program to the group that `sock` is in, in place of the one it has.

    Raises:
        KernelError
    """
    value = program.to_bytes(4, sys.byteorder)
    _set(sock, abi.SO_ATTACH_REUSEPORT_EBPF, value, "attach eBPF program")


def attach_cbpf(sock: int, program: list[classic.Insn]) -> None:
    """Attach a classic BPF program to the group that `sock` is in. This needs no privilege.

    Raises:
        KernelError
    """
    with sock_fprog(program) as value:
        _set(sock, abi.SO_ATTACH_REUSEPORT_CBPF, value, "attach classic BPF program")


def detach(sock: int) -> None:
    """Detach the program of a group, if it has one. The kernel's hash selects from then on.

    Raises:
        KernelError
    """
    try:
        _set(sock, abi.SO_DETACH_REUSEPORT_BPF, bytes(4), "detach the group's program")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise


def scratch() -> socket.socket:
    """An unbound socket, to see whether the kernel accepts a program."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock


class Locked(KernelError):
    """No program can be attached through a socket that has SO_LOCK_FILTER, see socket(7).

    It can be attached through another socket of the group, and detached through any."""


def locked(act: str, workers: Sequence[int] = ()) -> Locked:
    """Make the error for a locked socket.

    Args:
        act: what was tried.
        workers: the slots of the workers with locked sockets; empty if they are not known.
    """
    whose = values.several("worker", workers) if workers else "a worker"
    owned = "their sockets" if len(workers) > 1 else "its socket"
    cause = f"EPERM, as {whose} set SO_LOCK_FILTER on {owned}"
    cure = "leave one socket of the group without it, or restart that worker"
    return Locked(act, cause, cure, errno=errno.EPERM)


class NoMember(KernelError):
    """No program can be attached through a socket that is bound and in no group
    (reuseport_attach_prog() of net/core/sock_reuseport.c)."""


def is_locked(sock: int) -> bool:
    """Whether a socket has SO_LOCK_FILTER, so that no program can be attached through it."""
    with socket.socket(fileno=os.dup(sock)) as member_of:
        return bool(member_of.getsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER))


def unlocked(members: Sequence[int]) -> int:
    """The first of these sockets that is not locked; if all are locked, the first."""
    return next((fd for fd in members if not is_locked(fd)), members[0])


def refuse_locked(members: Iterable[socket.socket]) -> None:
    """Raises Locked: one of these sockets is locked."""
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


@contextmanager
def sock_fprog(program: Sequence[classic.Insn]) -> Iterator[bytes]:
    """A classic program as struct sock_fprog, which points to memory that is freed on leaving."""
    code = ctypes.create_string_buffer(classic.pack(program))
    yield bytes(_Fprog(len(program), ctypes.addressof(code)))


class _Fprog(ctypes.Structure):
    """Mirrors struct sock_fprog of include/uapi/linux/filter.h."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))
