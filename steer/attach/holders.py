"""The processes that hold a socket, and duplicates of the socket for a moment."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import msgspec

from steer.errors import KernelError
from steer.linux import processes, waiting
from steer.sockets.listeners import BORROW_CURES, pidfd_getfd


class Holder(msgspec.Struct, frozen=True):
    """A process that has a socket open, and the descriptor there."""

    pid: int
    fd: int


def find(
    inodes: Collection[int], pids: Iterable[int] | None = None
) -> dict[int, tuple[Holder, ...]]:
    """The holders of each socket, by inode, as far as we may inspect processes.

    Args:
        pids: look only at these processes.
    """
    found: dict[int, tuple[Holder, ...]] = {}
    for pid in sorted(processes.all_pids() if pids is None else pids):
        for fd, inode in _sockets(pid):
            if inode in inodes:
                found[inode] = (*found.get(inode, ()), Holder(pid, fd))
    return found


def _sockets(pid: int) -> Iterator[tuple[int, int]]:
    """Without the limits of `procfs.Files`, which costs several times as much for each file."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:  # gone, or not ours to look at
        return
    for name in names:
        with suppress(OSError):
            if inode := processes.inode_of(os.readlink(f"{directory}/{name}")):
                yield int(name), inode


def first_of(pids: Collection[int]) -> list[int]:
    """The processes whose parent is not among these."""
    return [pid for pid in pids if processes.parent(pid) not in pids]


def waiters(held: Mapping[int, Sequence[Holder]]) -> dict[int, int]:
    """The process that waits on each socket, by inode, even if it is busy at the moment. If several
    wait, the one with the lowest number."""
    inodes: dict[int, set[int]] = {}
    for inode, holders in held.items():
        for holder in holders:
            inodes.setdefault(holder.pid, set()).add(inode)
    found: dict[int, int] = {}
    for pid in sorted(inodes):
        for inode in waiting.waits(pid, frozenset(inodes[pid])) or ():
            found.setdefault(inode, pid)
    return found


@contextmanager
def borrowed(held: Mapping[int, Sequence[Holder]]) -> Iterator[dict[int, socket.socket]]:
    """Duplicates of sockets by inode, closed on leaving. A socket that has been closed is left out.

    Raises:
        KernelError: refused.
    """
    lent: dict[int, socket.socket] = {}
    try:
        for inode, holders in held.items():
            if (sock := _duplicate(inode, holders)) is not None:
                lent[inode] = sock
        yield lent
    finally:
        for sock in lent.values():
            sock.close()


def each_borrowed(
    held: Mapping[int, Sequence[Holder]],
) -> Generator[tuple[int, socket.socket]]:
    """The same, but one at a time, so that any number fits into the limit on open files.

    Raises:
        KernelError: refused.
    """
    for inode, holders in held.items():
        if (sock := _duplicate(inode, holders)) is not None:
            with sock:
                yield inode, sock


def _duplicate(inode: int, holders: Iterable[Holder]) -> socket.socket | None:
    refusal = None
    for holder in holders:
        try:
            fd = pidfd_getfd(holder.pid, holder.fd)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.EBADF):
                act = f"borrow a socket of pid {holder.pid}"
                refusal = KernelError.from_oserror(act, error, BORROW_CURES)
            continue
        if processes.socket_inode(fd) == inode:
            return socket.socket(fileno=fd)
        os.close(fd)
    if refusal is not None:
        raise refusal
    return None
