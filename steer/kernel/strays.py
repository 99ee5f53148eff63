"""Sockets of a worker that has ended, and that others still have open.

A program that a worker started has its listeners unless they were closed on execve(2). The
kernel goes on choosing such a listener, and nobody takes what waits there.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import msgspec

from steer.address import Bind
from steer.errors import KernelError
from steer.kernel import members, proc, sockdiag
from steer.kernel.listeners import Borrower


class Stray(msgspec.Struct, frozen=True):
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


def find(
    binds: Sequence[Bind], inodes: Sequence[int], family: Iterable[int], everywhere: bool
) -> list[Stray]:
    """Those of one worker.

    Args:
        inodes: of its sockets, one for each bind, see `proc.socket_inode`.
        family: processes that are left of it.
        everywhere: also where other processes have them, but for ones of steer's own.
    """
    by_inode = dict(zip(inodes, binds, strict=True))
    found = [
        Stray(by_inode[inode], inode, pid, proc.command(pid))
        for pid in family
        for inode in sorted(by_inode.keys() & _open_in(pid))
    ]
    if everywhere:
        known = {stray.inode for stray in found}
        for inode, bind in by_inode.items():
            if inode not in known and _is_open(bind, inode):
                found += _elsewhere(bind, inode)
    return found


def shut_down(strays: Iterable[Stray]) -> Iterator[tuple[Stray, str]]:
    """End them, whoever has them: what waits at a listener moves on as if that were closed
    (shutdown(2); inet_csk_listen_stop() of the kernel).

    One process that lends a socket is enough for all that have it open. Where those that are
    known do not, others are looked for.

    Returns:
        Each, with the reason why that could not be done; empty if it was.
    """
    by_inode: dict[int, list[Stray]] = {}
    for stray in strays:
        by_inode.setdefault(stray.inode, []).append(stray)
    for holders in by_inode.values():
        yield from _shut_down_one(holders)


def _shut_down_one(holders: list[Stray]) -> Iterator[tuple[Stray, str]]:
    """The same of one socket, with all that are known to have it open."""
    refusals = _refusals(holders)
    if all(refusals):
        tried = {stray.pid for stray in holders}
        more = _elsewhere(holders[0].bind, holders[0].inode)
        more = [stray for stray in more if stray.pid not in tried]
        refusals += _refusals(more)
        holders = holders + more
    is_done = not all(refusals)
    for stray, refusal in zip(holders, refusals, strict=True):
        yield stray, "" if is_done else refusal


def _refusals(holders: Iterable[Stray]) -> list[str]:
    """Why each does not lend it; those that come after one who did are not asked."""
    refusals: list[str] = []
    for stray in holders:
        refusals.append("" if "" in refusals else _shut_down(stray))
    return refusals


def _open_in(pid: int) -> set[int]:
    with suppress(KernelError):
        return {inode for _, inode in proc.sockets_by_fd(pid)}
    return set()


def _is_open(bind: Bind, inode: int) -> bool:
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    try:
        return inode in sockdiag.waiting(bind.protocol, family, bind.port)
    except KernelError:
        return True  # it cannot be told so cheaply: look for who has it


def _elsewhere(bind: Bind, inode: int) -> list[Stray]:
    protocol: proc.Protocol = "udp" if bind.protocol == "udp" else "tcp"
    try:
        here = proc.holders(protocol, bind.address, bind.port)
    except OSError:  # no descriptor to look with: the worker's place does not wait for that
        return []
    return [Stray(bind, inode, each.pid, each.command) for each in here if each.inode == inode]


def _shut_down(stray: Stray) -> str:
    """A UDP socket cannot be shut down; but connected to nobody it gets nothing more."""
    if stray.pid is None:
        return "what comes for it waits for nobody; end that process"
    try:
        with Borrower(stray.pid, frozenset({stray.inode})).borrow() as lent:
            for sock in lent.values():
                if stray.bind.protocol == "udp" and not members.cut_off(sock):
                    return "datagrams that the kernel gives it are lost until that process ends"
                with suppress(OSError):  # it was already, through another process
                    sock.shutdown(socket.SHUT_RDWR)
    except KernelError as error:
        return str(error)
    return ""
