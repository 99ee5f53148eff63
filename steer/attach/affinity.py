"""Which CPU each listener of a group serves, by the affinity of the thread that waits on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from steer.attach.group_holders import GroupHolders
from steer.attach.roster import Member, Roster
from steer.linux import waiting
from steer.policy import cpus
from steer.policy.cpus import Topology


class Affinities:
    """Of the threads that wait on the listeners of one group. A server may pin them (nginx's
    worker_cpu_affinity, haproxy's cpu-map), and so may its user (taskset(1))."""

    def __init__(self, roster: Roster, group_holders: GroupHolders) -> None:
        self._roster = roster
        self._holders = group_holders

    def cpu_of_each(self, topology: Topology) -> Mapping[int, int]:
        """The CPU that each slot serves."""
        if any(each.tid is None for each in self._roster):
            self._find_threads()
        affinities = {each.slot: self._affinity(each) for each in self._roster}
        return cpus.cpu_of_each_slot(affinities, topology)

    def _find_threads(self) -> None:
        self._holders.look_at_waiters()
        inodes: dict[int, set[int]] = {}
        for each in self._roster:
            if each.tid is None and each.pid is not None:
                inodes.setdefault(each.pid, set()).add(each.listener.inode)
        found: dict[int, int] = {}
        for pid, wanted in inodes.items():
            found |= waiting.thread_of_each(pid, frozenset(wanted))
        for each in self._roster:
            each.tid = found.get(each.listener.inode, each.tid)

    def _affinity(self, member: Member) -> frozenset[int]:
        """Empty if it cannot be told."""
        if member.tid is not None:
            with suppress(OSError):
                return frozenset(os.sched_getaffinity(member.tid))
            member.tid = None  # it has ended
        if (pid := self._holders.pid_of(member)) is not None:
            with suppress(OSError):
                return frozenset(os.sched_getaffinity(pid))
        return frozenset()
