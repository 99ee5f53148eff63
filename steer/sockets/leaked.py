"""Sockets of a worker that has ended, and that other processes still have open.

A program that a worker started inherits its listeners, unless they are closed on execve(2). The
kernel still selects such a listener, but no process accepts the connections that wait there.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress

import msgspec

from steer.config.address import Bind
from steer.errors import KernelError
from steer.linux import port_holders, processes
from steer.sockets import members, sock_diag
from steer.sockets.listeners import Borrower


class LeakedSocket(msgspec.Struct, frozen=True):
    """A socket that outlived its worker, and a process that has it open.

    Args:
        pid, command: None if the process could not be found.
    """

    bind: Bind
    inode: int
    pid: int | None
    command: str | None

    def __str__(self) -> str:
        who = f"{self.command or '?'} (pid {self.pid})" if self.pid else "an unseen process"
        return f"{who} still has its socket of {self.bind.label} open"


class Snapshot:
    """What the kernel and /proc say about the sockets at each port, looked up once.

    Make it after the workers have ended, and share it among those that ended together."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int, int], Collection[int] | None] = {}
        self._holders: dict[Bind, list[port_holders.Holder]] = {}

    def is_open(self, bind: Bind, inode: int) -> bool:
        """Whether a process has the socket open; True if the kernel does not say."""
        at = bind.protocol, socket.AF_INET6 if bind.is_v6 else socket.AF_INET, bind.port
        if at not in self._open:
            self._open[at] = _open_at(*at)
        open_inodes = self._open[at]
        return open_inodes is None or inode in open_inodes

    def holders(self, bind: Bind, inode: int) -> list[LeakedSocket]:
        """Who has the socket open."""
        if bind not in self._holders:
            self._holders[bind] = _holders(bind)
        here = self._holders[bind]
        return [
            LeakedSocket(bind, inode, each.pid, each.command)
            for each in here
            if each.inode == inode
        ]


def find(
    binds: Sequence[Bind],
    inodes: Sequence[int],
    family: Iterable[int],
    everywhere: bool,
    snapshot: Snapshot | None = None,
) -> list[LeakedSocket]:
    """Find the leaked sockets of one worker.

    Args:
        inodes: the inodes of its sockets, one for each bind, see `processes.socket_inode`.
        family: processes of the worker that still run.
        everywhere: look in all processes of the machine, except those of steer.
        snapshot: shared with other workers that ended at the same time.
    """
    by_inode = dict(zip(inodes, binds, strict=True))
    snapshot = snapshot or Snapshot()
    found = [
        LeakedSocket(by_inode[inode], inode, pid, processes.command(pid))
        for pid in family
        for inode in sorted(by_inode.keys() & _open_in(pid))
    ]
    if everywhere:
        known = {leak.inode for leak in found}
        for inode, bind in by_inode.items():
            if inode not in known and snapshot.is_open(bind, inode):
                found += snapshot.holders(bind, inode)
    return found


def shut_down(leaks: Iterable[LeakedSocket]) -> Iterator[tuple[LeakedSocket, str]]:
    """Shut leaked sockets down, so that what waits in a listener moves to others as if the listener
    were closed (shutdown(2); inet_csk_listen_stop() of the kernel).

    To shut a socket down, it is borrowed from one of the processes that have it open. If none of
    the known ones lends it, other processes are tried.

    Returns:
        Each leaked socket, and why it could not be shut down; "" if it was.
    """
    by_inode: dict[int, list[LeakedSocket]] = {}
    for leak in leaks:
        by_inode.setdefault(leak.inode, []).append(leak)
    for holders in by_inode.values():
        yield from _shut_down_one(holders)


def _shut_down_one(holders: list[LeakedSocket]) -> Iterator[tuple[LeakedSocket, str]]:
    """Shut one socket down.

    Args:
        holders: the processes that are known to have it open.
    """
    refusals = _refusals(holders)
    if all(refusals):
        tried = {leak.pid for leak in holders}
        more = Snapshot().holders(holders[0].bind, holders[0].inode)
        more = [leak for leak in more if leak.pid not in tried]
        refusals += _refusals(more)
        holders = holders + more
    is_done = not all(refusals)
    for leak, refusal in zip(holders, refusals, strict=True):
        yield leak, "" if is_done else refusal


def _refusals(holders: Iterable[LeakedSocket]) -> list[str]:
    """Why each process does not lend the socket. Those after one that lends it are not asked."""
    refusals: list[str] = []
    for leak in holders:
        refusals.append("" if "" in refusals else _shut_down(leak))
    return refusals


def _open_in(pid: int) -> set[int]:
    with suppress(KernelError):
        return {inode for _, inode in processes.sockets_by_fd(pid)}
    return set()


def _open_at(protocol: str, family: int, port: int) -> Collection[int] | None:
    """The inodes of the sockets at a port; None if the kernel does not say."""
    try:
        return sock_diag.waiting(protocol, family, port).keys()
    except KernelError:
        return None


def _holders(bind: Bind) -> list[port_holders.Holder]:
    protocol: port_holders.Protocol = "udp" if bind.protocol == "udp" else "tcp"
    try:
        return port_holders.holders(protocol, bind.address, bind.port)
    except OSError:  # no descriptor is left: do not delay the next worker in this slot
        return []


def _shut_down(leak: LeakedSocket) -> str:
    """Shut a socket down; why that failed, or "".

    A UDP socket cannot be shut down. It is connected to an address that sends nothing instead.
    """
    if leak.pid is None:
        return "what comes for it waits for nobody; end that process"
    try:
        with Borrower(leak.pid, frozenset({leak.inode})).borrow() as lent:
            for sock in lent.values():
                if leak.bind.protocol == "udp" and not members.cut_off(sock):
                    return "datagrams that the kernel gives it are lost until that process ends"
                with suppress(OSError):  # another process has shut it down already
                    sock.shutdown(socket.SHUT_RDWR)
    except KernelError as error:
        return str(error)
    return ""
