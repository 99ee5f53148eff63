"""Sockets of a worker that has ended, and that others still have open.

A program that a worker started has its listeners unless they were closed on execve(2). The
kernel goes on choosing such a listener, and nobody takes what waits there.
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
    """A socket that outlived its worker, and who has it open.

    Args:
        pid, command: None where no process could be seen to have it open.
    """

    bind: Bind
    inode: int
    pid: int | None
    command: str | None

    def __str__(self) -> str:
        who = f"{self.command or '?'} (pid {self.pid})" if self.pid else "an unseen process"
        return f"{who} still has its socket of {self.bind.label} open"


class Snapshot:
    """What the kernel and /proc tell of the sockets of workers that have ended: for all of them,
    each port is asked for once. To be made after they have ended."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int, int], Collection[int] | None] = {}
        self._holders: dict[Bind, list[port_holders.Holder]] = {}

    def is_open(self, bind: Bind, inode: int) -> bool:
        """Whether anybody has the socket open, as far as that can be told so cheaply."""
        at = bind.protocol, socket.AF_INET6 if bind.is_v6 else socket.AF_INET, bind.port
        if at not in self._open:
            self._open[at] = _open_at(*at)
        there = self._open[at]
        return there is None or inode in there

    def holders(self, bind: Bind, inode: int) -> list[LeakedSocket]:
        """Whoever has it open."""
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
    """Those of one worker.

    Args:
        inodes: of its sockets, one for each bind, see `processes.socket_inode`.
        family: processes that are left of it.
        everywhere: also where other processes have them, but for ones of steer's own.
        snapshot: shared with others that ended at the same time.
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
    """End them, whoever has them: what waits at a listener moves on as if that were closed
    (shutdown(2); inet_csk_listen_stop() of the kernel).

    One process that lends a socket is enough for all that have it open. Where those that are
    known do not, others are looked for.

    Returns:
        Each, with the reason why that could not be done; empty if it was.
    """
    by_inode: dict[int, list[LeakedSocket]] = {}
    for leak in leaks:
        by_inode.setdefault(leak.inode, []).append(leak)
    for holders in by_inode.values():
        yield from _shut_down_one(holders)


def _shut_down_one(holders: list[LeakedSocket]) -> Iterator[tuple[LeakedSocket, str]]:
    """The same of one socket, with all that are known to have it open."""
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
    """Why each does not lend it; those that come after one who did are not asked."""
    refusals: list[str] = []
    for leak in holders:
        refusals.append("" if "" in refusals else _shut_down(leak))
    return refusals


def _open_in(pid: int) -> set[int]:
    with suppress(KernelError):
        return {inode for _, inode in processes.sockets_by_fd(pid)}
    return set()


def _open_at(protocol: str, family: int, port: int) -> Collection[int] | None:
    """None where it cannot be told so cheaply: then it is looked for who has each."""
    try:
        return sock_diag.waiting(protocol, family, port).keys()
    except KernelError:
        return None


def _holders(bind: Bind) -> list[port_holders.Holder]:
    protocol: port_holders.Protocol = "udp" if bind.protocol == "udp" else "tcp"
    try:
        return port_holders.holders(protocol, bind.address, bind.port)
    except OSError:  # no descriptor to look with: the worker's place does not wait for that
        return []


def _shut_down(leak: LeakedSocket) -> str:
    """A UDP socket cannot be shut down; but connected to nobody it gets nothing more."""
    if leak.pid is None:
        return "what comes for it waits for nobody; end that process"
    try:
        with Borrower(leak.pid, frozenset({leak.inode})).borrow() as lent:
            for sock in lent.values():
                if leak.bind.protocol == "udp" and not members.cut_off(sock):
                    return "datagrams that the kernel gives it are lost until that process ends"
                with suppress(OSError):  # it was already, through another process
                    sock.shutdown(socket.SHUT_RDWR)
    except KernelError as error:
        return str(error)
    return ""
