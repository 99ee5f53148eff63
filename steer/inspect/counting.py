"""How many connections came to be established at each listener while we watched."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress

from steer.errors import KernelError
from steer.inspect.seeing import View
from steer.inspect.seen import Seen
from steer.linux import netns, processes
from steer.loader.kernel_sockets import Count

_MOST = 1 << 16
"""Listeners of all network namespaces that are looked at."""


def count(
    view: View, selected: Sequence[Seen], seconds: float
) -> tuple[Mapping[int, int], list[str]]:
    """Wait so long; an interrupt ends it early.

    Returns:
        The number for each listener that could be counted at, by its inode; and why others could
        not.
    """
    listeners = [each for each in selected if each.protocol == "tcp"]
    notes = []
    if len(listeners) < len(selected):
        notes.append("datagrams are not counted: the kernel tells of none where it was received")
    if not listeners:
        return {}, notes
    if view.look is None:
        return {}, [*notes, "connections cannot be counted without CAP_BPF and CAP_PERFMON"]
    try:
        with view.look.count(_MOST) as counting:
            there = [each for each in _groups(view, listeners) if _add(counting, *each, notes)]
            _wait(seconds)
            found = counting.so_far()
    except KernelError as error:
        return {}, [*notes, f"connections cannot be counted: {error.note}"]
    counted = {number for number, _ in there}
    return {
        each.inode: found.get(each.kernel_address, 0) for each in listeners if each.netns in counted
    }, notes


def _wait(seconds: float) -> None:
    with suppress(KeyboardInterrupt):
        time.sleep(seconds)


def _groups(view: View, listeners: Iterable[Seen]) -> Iterable[tuple[int, str | None]]:
    """The network namespaces of some sockets: number, and a file by which it can be entered."""
    found: dict[int, str | None] = {netns.own(): ""}
    named = {number: f"/run/netns/{name}" for number, name in netns.names().items()}
    for each in listeners:
        if each.netns not in found:
            holders = view.holders.get(each.inode, ())
            found[each.netns] = named.get(each.netns) or _file(each.netns, holders)
    wanted = {each.netns for each in listeners}
    return ((number, path) for number, path in found.items() if number in wanted)


def _file(number: int, likely: Iterable[int]) -> str | None:
    """Of a process that is in it: those that have its sockets most probably are."""
    for pid in (*likely, *processes.all_pids()):
        path = f"/proc/{pid}/ns/net"
        with suppress(OSError):
            if os.stat(path).st_ino == number:
                return path
    return None


def _add(counting: Count, number: int, path: str | None, notes: list[str]) -> bool:
    """Whether listeners of that network namespace are counted at."""
    if path is None:
        notes.append(f"no process is in network namespace {number}: nothing is counted there")
        return False
    try:
        with netns.entered(path) if path else nullcontext():
            counting.add_this_netns()
    except KernelError as error:
        notes.append(f"nothing is counted in network namespace {number}: {error.note}")
        return False
    return True
