"""How often processes are looked at to find those that wait on listeners."""

from __future__ import annotations

import os

import pytest

from steer.attach import group_holders
from steer.attach.group_holders import GroupHolders
from steer.attach.holders import Holder
from steer.attach.roster import Roster, Slots
from steer.linux.waiting import Seen
from steer.sockets.sock_diag import Listener


def test_process_is_looked_at_once_for_all_of_its_listeners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []

    def look(pid: int, inodes: frozenset[int]) -> dict[int, Seen]:
        looks.append(pid)
        return {inode: Seen.NO if inode % 2 else Seen.YES for inode in inodes}

    monkeypatch.setattr(group_holders.waiting, "waits_on_each", look)
    roster, pid = Roster(Slots(320)), os.getpid()
    for inode in range(320):
        made = Listener(
            0, 128, inode=inode, address=bytes(4), device=0, uid=0, cookie=inode, cgroup=1
        )
        roster.add(made, [Holder(pid, inode)], 0.0, inode)
    assert GroupHolders(roster).waited_on() == set(range(0, 320, 2))
    assert looks == [pid]
