"""Counts the connections that are established at each listener for a while."""

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
"""Limit for the listeners of all network namespaces together."""


def count(
    view: View, selected: Sequence[Seen], seconds: float
) -> tuple[Mapping[int, int], list[str]]:
    """Count for that long, or until SIGINT.

    Returns:
        The count of each listener, by inode; and notes on what could not be counted.
    """
    listeners = [each for each in selected if each.protocol == "tcp"]
    notes = []
    if len(listeners) < len(selected):
        notes.append("datagrams are not counted, only TCP connections")
    if not listeners:
        return {}, notes
    if view.look is None:
        return {}, [*notes, "cannot count connections without CAP_BPF and CAP_PERFMON; run as root"]
    try:
        with view.look.count(_MOST) as counting:
            there = [each for each in _groups(view, listeners) if _add(counting, *each, notes)]
            _wait(seconds)
            found = counting.so_far()
    except KernelError as error:
        return {}, [*notes, f"cannot count: {error.note}"]
    counted = {number for number, _ in there}
    return {
        each.inode: found.get(each.kernel_address, 0) for each in listeners if each.netns in counted
    }, notes


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
