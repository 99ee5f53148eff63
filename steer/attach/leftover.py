"""Removes the program that an attacher left because it was killed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

import msgspec

from steer.abi import ABANDONED_S
from steer.attach import holders
from steer.attach.binds import listeners_at
from steer.config.address import Bind
from steer.errors import AttachRefused
from steer.loader import heartbeat
from steer.loader.kernel_sockets import Look
from steer.sockets import group_program
from steer.values import several

_OURS = b"steer_"
_MARGIN_S = 0.1


class _Program(msgspec.Struct, frozen=True):
    """A program at an address whose name is as steer's are.

    Args:
        inodes: of the listeners of its group.
        pids: the processes that have it open.
    """

    number: int
    inodes: Collection[int]
    pids: Collection[int]


def remove(bind: Bind, act: str) -> bool:
    """Leave the listeners at an address to the kernel's hash.

    Returns:
        Whether a killed attacher had left a program there.

    Raises:
        AttachRefused: an attacher still has its program open.
        KernelError: that cannot be seen, or done.
    """
    is_removed = False
    for program in _programs(bind):
        silent_s = heartbeat.silent_s(program.number)
        if silent_s is None:
            continue
        if program.pids:
            raise _refusal(act, program.pids, silent_s)
        refuse_unseen(program.number, act)
        is_removed = _detach(program) or is_removed
    return is_removed


def refuse_unseen(number: int, act: str) -> None:
    """Make sure that a program that no process seems to have open has no attacher any more.

    It may have been killed a moment ago, or be in another pid namespace: so a heartbeat that is not
    old yet is looked at once more when it would be. Does nothing for a program without heartbeat.

    Raises:
        AttachRefused: the heartbeat is renewed.
        KernelError: it cannot be read.
    """
    silent_s = heartbeat.silent_s(number)
    if silent_s is None or silent_s > ABANDONED_S:
        return
    time.sleep(ABANDONED_S - silent_s + _MARGIN_S)
    silent_s = heartbeat.silent_s(number)
    if silent_s is not None and silent_s <= ABANDONED_S:
        cause = "an attacher that cannot be seen from here steers it"
        raise AttachRefused(act, cause, "detach where `steer attach` runs")


def _programs(bind: Bind) -> Iterator[_Program]:
    there = listeners_at(bind)
    if not there:
        return
    with Look() as look:
        seen = [each for each in look.in_this_netns() if each.inode in there]
        # Connected UDP sockets may have split the group: then each part has the program.
        ours = {each.group: each for each in seen if each.name.startswith(_OURS)}
        held_by = look.holders({each.program for each in ours.values()}) if ours else {}
    for group, each in ours.items():
        inodes = [one.inode for one in seen if one.group == group]
        yield _Program(each.program_id, inodes, sorted(held_by[each.program]))


def _refusal(act: str, pids: Collection[int], silent_s: float) -> AttachRefused:
    who = several("pid", pids)
    pid = min(pids)
    if silent_s <= ABANDONED_S:
        cause = f"{who} steers it, but its control socket is in none of the usual directories"
        return AttachRefused(act, cause, f"`kill {pid}` ends it")
    cause = f"its attacher ({who}) has been stopped or hung for {silent_s:.1f} s"
    cure = f"`kill -CONT {pid}` if it is stopped; if it hangs, `kill -KILL {pid}` and detach again"
    return AttachRefused(act, cause, cure)


def _detach(program: _Program) -> bool:
    with holders.borrowed(holders.find(program.inodes)) as lent:
        for sock in list(lent.values())[:1]:
            group_program.detach(sock.fileno())
        return bool(lent)
