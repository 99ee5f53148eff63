"""Counts the connections that are established at each listener for a while, and the datagrams that
each UDP socket receives."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress

import msgspec

from steer.errors import KernelError
from steer.inspect.seeing import View
from steer.inspect.seen import Seen
from steer.linux import netns, processes
from steer.loader.kernel_sockets import Count, Look

_MISSED = "interrupts came while the program that counts ran on the same CPU"
_MOST = 1 << 16
"""Limit for the sockets of all network namespaces together."""


class Counted(msgspec.Struct):
    """What was counted.

    Args:
        counts: by inode.
        notes: what could not be counted, and why.
    """

    counts: dict[int, int] = {}
    notes: list[str] = []


def count(view: View, selected: Sequence[Seen], seconds: float) -> Counted:
    """Count for that long, or until SIGINT."""
    found = Counted()
    if selected and view.look is None:
        found.notes.append("cannot count without CAP_BPF and CAP_PERFMON; run as root")
    if not selected or view.look is None:
        return found
    with ExitStack() as stack:
        counting = list(_begin(view, view.look, selected, found, stack))
        if counting:
            _wait(seconds)
        for each, sockets in counting:
            try:
                numbers, missed = each.so_far(), each.missed()
            except KernelError as error:
                found.notes.append(f"cannot count: {error.note}")
                continue
            if missed:
                found.notes.append(f"up to {missed} more may have come: {_MISSED}")
            for sock in sockets:
                found.counts[sock.inode] = numbers.get(sock.kernel_address, 0)
    return found


def _begin(
    view: View, look: Look, selected: Sequence[Seen], found: Counted, stack: ExitStack
) -> Iterator[tuple[Count, Sequence[Seen]]]:
    """Begin to count. Returns: what counts, and at which sockets."""
    for protocol, what in (("tcp", "connections"), ("udp", "datagrams")):
        sockets = [each for each in selected if each.protocol == protocol]
        if not sockets:
            continue
        try:
            counting = stack.enter_context(look.count(protocol, _MOST))
        except KernelError as error:
            found.notes.append(f"cannot count {what}: {error.note}")
            continue
        there = {
            number
            for number, path in _groups(view, sockets)
            if _add(counting, number, path, found.notes)
        }
        yield counting, [each for each in sockets if each.netns in there]


def _wait(seconds: float) -> None:
    with suppress(KeyboardInterrupt):
        time.sleep(seconds)


def _groups(view: View, listeners: Iterable[Seen]) -> Iterable[tuple[int, str | None]]:
    """The network namespaces of some sockets: the number of each, and a file to enter it by: ""
    for our own, None if there is none."""
    found: dict[int, str | None] = {netns.own(): ""}
    named = {number: f"/run/netns/{name}" for number, name in netns.names().items()}
    for each in listeners:
        if each.netns not in found:
            holders = view.holders.get(each.inode, ())
            found[each.netns] = named.get(each.netns) or _file(each.netns, holders)
    wanted = {each.netns for each in listeners}
    return ((number, path) for number, path in found.items() if number in wanted)


def _file(number: int, likely: Iterable[int]) -> str | None:
    """The file of a process that is in it. Those that hold its sockets are tried first."""
    for pid in (*likely, *processes.all_pids()):
        path = f"/proc/{pid}/ns/net"
        with suppress(OSError):
            if os.stat(path).st_ino == number:
                return path
    return None


def _add(counting: Count, number: int, path: str | None, notes: list[str]) -> bool:
    """Count in that network namespace too. Returns whether that is possible."""
    if path is None:
        notes.append(f"cannot count in network namespace {number}: no process is in it")
        return False
    try:
        with netns.entered(path) if path else nullcontext():
            counting.add_this_netns()
    except KernelError as error:
        notes.append(f"cannot count in network namespace {number}: {error.note}")
        return False
    return True
