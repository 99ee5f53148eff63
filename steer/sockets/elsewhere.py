"""Finds TCP ports on which a worker listens with sockets that steer did not give it."""

from __future__ import annotations

import msgspec

from steer.errors import KernelError
from steer.linux import port_holders, processes
from steer.linux.procfs import Files


class Elsewhere(msgspec.Struct, frozen=True):
    """A process of a worker that listens on sockets of its own.

    Args:
        ports: in ascending order.
    """

    pid: int
    ports: tuple[int, ...]


def find(pid: int, inodes: frozenset[int]) -> Elsewhere | None:
    """The first of `pid` and its descendants that listens on another socket, in the network
    namespace of `pid`. None if there is none, or if that cannot be seen.

    Args:
        inodes: the inodes of the sockets that steer gave it.
    """
    try:
        for member in processes.family(pid, Files()):
            others = {inode for _, inode in processes.sockets_by_fd(member)} - inodes
            if ports := _listening(pid, others):
                return Elsewhere(member, ports)
    except (KernelError, OSError):
        pass
    return None


def _listening(pid: int, inodes: set[int]) -> tuple[int, ...]:
    """The ports of those of these sockets that listen. Raises OSError."""
    if not inodes:
        return ()
    table = port_holders.bound_sockets("tcp", f"/proc/{pid}")
    return tuple(sorted({each.port for each in table if each.waiting and each.inode in inodes}))
