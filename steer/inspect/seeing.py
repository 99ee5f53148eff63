"""Looks at sockets: with BPF iterators, or else with sock_diag(7) and /proc."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Mapping, Set
from contextlib import ExitStack, nullcontext
from functools import cache

import msgspec

from steer.errors import KernelError
from steer.inspect.seen import Seen, SeenProgram
from steer.linux import netns, processes
from steer.linux.procfs import EVERYTHING, Files
from steer.loader.kernel_sockets import KernelSocket, Look
from steer.sockets import sock_diag
from steer.sockets.sock_diag import Server

_TCP = 6
_PROTOCOLS = {_TCP: "tcp", 17: "udp"}
_ESTABLISHED = 1


class View(msgspec.Struct):
    """What was seen.

    Args:
        sockets: each once.
        holders: the processes that hold each socket, by inode.
        look: for further questions; None if there are no BPF iterators.
        notes: what could not be seen, and why.
        partly_seen: inodes of sockets that processes hidden from us may hold, too.
    """

    sockets: list[Seen]
    holders: Mapping[int, Collection[int]]
    look: Look | None
    notes: list[str]
    partly_seen: Set[int] = frozenset()


def see(only: str | None, stack: ExitStack) -> View:
    """All sockets of one network namespace, or of all that can be seen.

    Args:
        only: file of the network namespace.
        stack: keeps `View.look` open.

    Raises:
        KernelError: the namespace cannot be entered, or the kernel does not list sockets.
    """
    with netns.entered(only) if only else nullcontext():
        try:
            look = stack.enter_context(Look())
            return _by_kernel(look, netns.own() if only else None)
        except KernelError as error:
            return _by_diag(error)


# ---- by BPF iterators


def _by_kernel(look: Look, only: int | None) -> View:
    """Args: only: number of the only network namespace to show."""
    found: dict[int, Seen] = {}
    holders: dict[int, set[int]] = {}
    for each in look.held():
        if only in (None, each.netns):
            if each.address not in found:
                found[each.address] = _seen(each)
            holders.setdefault(each.inode, set()).add(each.pid)
    found |= {each.address: _seen(each) for each in look.in_this_netns(found.keys())}
    return View(list(found.values()), holders, look, [])


def _seen(each: KernelSocket) -> Seen:
    is_tcp = each.protocol == _TCP
    return Seen(
        protocol=_PROTOCOLS[each.protocol],
        address=_address(each.family, each.ip),
        port=each.port,
        is_v6only=bool(each.is_v6only),
        device=each.device,
        netns=each.netns,
        uid=each.uid,
        inode=each.inode,
        cookie=each.cookie,
        queued=each.queued if is_tcp else each.memory,
        backlog=each.backlog if is_tcp else each.memory_limit,
        drops=each.drops,
        cgroup=each.cgroup or None,
        is_connected=not is_tcp and each.state == _ESTABLISHED,
        group=each.group,
        members=each.members,
        by_cpu=each.by_cpu,
        program=_program(each) if each.program else None,
        kernel_address=each.address,
    )


@cache
def _address(family: int, ip: bytes) -> str:
    return socket.inet_ntop(family, ip[: 4 if family == socket.AF_INET else 16])


def _program(each: KernelSocket) -> SeenProgram:
    return SeenProgram(
        address=each.program,
        id=each.program_id,
        name=each.name.partition(b"\0")[0].decode(errors="replace"),
        tag=each.tag.hex(),
        uid=each.program_uid,
        loaded_ns=each.loaded_ns,
        instructions=each.classic_length,
    )


# ---- by sock_diag(7) and /proc


def _by_diag(why: KernelError) -> View:
    """Those of the network namespace that we are in. Args: why: why not `_by_kernel`."""
    number = netns.own()
    found = [
        _as_seen(each, number)
        for protocol in ("tcp", "udp")
        for each in sock_diag.servers(protocol)
    ]
    holders, hidden = _holders({each.inode for each in found})
    note = f"cannot see BPF programs or other network namespaces: {why.note}"
    serving = [each for each in found if not each.is_connected]
    return View(serving, holders, None, [note], _partly_seen(serving, holders, hidden))


def _as_seen(each: Server, number: int) -> Seen:
    return Seen(
        protocol=each.protocol,
        address=each.address,
        port=each.port,
        is_v6only=each.is_v6only,
        device=each.device,
        netns=number,
        uid=each.uid,
        inode=each.inode,
        cookie=each.cookie,
        queued=each.queued,
        backlog=each.limit,
        drops=each.drops,
        cgroup=each.cgroup,
        is_connected=each.is_connected,
    )


def _holders(inodes: Collection[int]) -> tuple[Mapping[int, Collection[int]], Set[int]]:
    """The processes that hold these sockets, as far as we may see; and those that we may not
    look at."""
    found: dict[int, set[int]] = {}
    hidden: set[int] = set()
    for pid in processes.all_pids():
        try:
            for _, inode in processes.sockets_by_fd(pid, files=Files(most_reads=EVERYTHING)):
                if inode in inodes:
                    found.setdefault(inode, set()).add(pid)
        except KernelError:
            hidden.add(pid)
    return found, hidden


def _partly_seen(
    sockets: Iterable[Seen], holders: Mapping[int, Collection[int]], hidden: Iterable[int]
) -> Set[int]:
    """The sockets that hidden processes may hold, too: those of which no holder is seen, those
    that another user created, and those that a child of a holder may have inherited."""
    parents = {processes.parent(pid) for pid in hidden}
    return {
        each.inode
        for each in sockets
        if each.uid != os.geteuid()
        or each.inode not in holders
        or not parents.isdisjoint(holders[each.inode])
    }
