"""The connections of a group that were accepted before the attach."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from steer.attach import holders
from steer.attach.group_holders import GroupHolders
from steer.attach.holders import Holder
from steer.attach.roster import Roster
from steer.config.address import Bind
from steer.sockets import sock_diag

_MOST = 4096
"""The most connections to look for."""


class Older(msgspec.Struct, frozen=True):
    """Connections by inode.

    Args:
        slots: the slot of the listener that a holder of the connection waits on.
        holders: the processes that hold the connection.
        is_complete: whether each connection has a slot.
    """

    slots: Mapping[int, int]
    holders: Mapping[int, Sequence[Holder]]
    is_complete: bool


def find(bind: Bind, roster: Roster, held_by_group: GroupHolders) -> Older:
    """Raises KernelError: the kernel, or a filter, does not let us ask for them."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    accepted = sock_diag.connections(family, bind.port, _MOST)
    waiting = {each.slot: held_by_group.pid_of(each) for each in roster}
    counts = Counter(waiting.values())
    # If a process waits on several listeners, the connection may be from any of them.
    slots = {pid: slot for slot, pid in waiting.items() if counts[pid] == 1}
    known = {holder.pid for each in roster for holder in each.holders}
    held = holders.find({each.inode for each in accepted}, known) if accepted else {}
    found = {
        inode: slots[holder.pid]
        for inode, held_by in held.items()
        for holder in held_by
        if holder.pid in slots
    }
    return Older(found, held, found.keys() == held.keys())
