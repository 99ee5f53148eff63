"""Which processes hold the listeners of one group, and which of them wait on one."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager

from steer.attach import holders
from steer.attach.holders import Holder
from steer.attach.roster import Member, Roster
from steer.linux import processes, waiting
from steer.linux.procfs import Files


class GroupHolders:
    """The holders of the listeners of one group.

    A look at all processes takes far longer than one at the processes that probably hold them.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._likely: set[int] = set()

    def add_likely(self, pids: Iterable[int]) -> None:
        """Look at these processes first."""
        self._likely.update(pids)

    def of(self, inodes: Set[int]) -> Mapping[int, Sequence[Holder]]:
        """The processes that hold these sockets, by inode."""
        return self._find(inodes, self._known_pids())

    def _known_pids(self) -> frozenset[int]:
        """Processes that held listeners when they were last looked at."""
        held = (holder.pid for each in self._roster for holder in each.holders)
        return frozenset(self._likely.union(held))

    def _find(self, inodes: Set[int], likely: Iterable[int]) -> Mapping[int, Sequence[Holder]]:
        """Look first at processes that are likely to hold them: to look at all takes far longer."""
        held = holders.find(inodes, likely)
        rest = inodes - held.keys()
        return {**held, **holders.find(rest)} if rest else held

    def look(self) -> None:
        """Find out which processes hold the listeners now, and which of them wait: a server may
        have replaced its workers since, and given them the same listeners."""
        known = self._known_pids()
        parents = holders.first_of(known)
        family = {each for pid in parents for each in processes.family(pid, Files("/proc"))}
        held = self._find({each.listener.inode for each in self._roster}, known | family)
        for member in self._roster:
            member.holders = held.get(member.listener.inode, ())
        self.look_at_waiters()

    def look_at_waiters(self) -> None:
        waiters = holders.waiters({each.listener.inode: each.holders for each in self._roster})
        for member in self._roster:
            pid = waiters.get(member.listener.inode, member.pid)
            if pid != member.pid:
                member.pid, member.tid = pid, None

    def pid_of(self, member: Member) -> int | None:
        """The process that waits on the listener; if none was seen to, one that holds it."""
        pids = {each.pid for each in member.holders}
        return member.pid if member.pid in pids else min(pids, default=None)

    @property
    def is_held_together(self) -> bool:
        """Whether several processes hold the same listener."""
        return len(self._roster) > 1 and any(
            len({holder.pid for holder in each.holders}) > 1 for each in self._roster
        )

    def waited_on(self) -> set[int]:
        """The listeners that have joined, are not selected yet, and are waited on, by inode."""
        starting: dict[frozenset[int], set[int]] = {}
        for each in self._roster.starting:
            pids = frozenset(holder.pid for holder in each.holders)
            starting.setdefault(pids, set()).add(each.listener.inode)
        serving = self._serving() if starting else frozenset[int]()
        found = (_waited_on(pids, frozenset(each), serving) for pids, each in starting.items())
        return set().union(*found)

    def _serving(self) -> frozenset[int]:
        """The processes that hold a selected listener which no other process holds."""
        owners = ({holder.pid for holder in each.holders} for each in self._roster.selected)
        return frozenset(min(pids) for pids in owners if len(pids) == 1)

    @contextmanager
    def lend(self) -> Iterator[Mapping[int, socket.socket]]:
        """Lend any member of the group."""
        for each in self._roster:
            with holders.borrowed(self._of_member(each)) as lent:
                if lent:
                    yield {0: lent[each.listener.inode]}
                    return
        yield {}

    @contextmanager
    def lend_any(self, inodes: Set[int]) -> Iterator[Mapping[int, socket.socket]]:
        """Lend any of these sockets, which need not have joined."""
        held = self.of(inodes)
        with closing(holders.each_borrowed(held)) as lent:
            first = next(lent, None)
            yield {0: first[1]} if first else {}

    def _of_member(self, member: Member) -> Mapping[int, Sequence[Holder]]:
        """The processes that held the listener when it joined; others if they have closed it."""
        inode = member.listener.inode
        with holders.borrowed({inode: member.holders}) as lent:
            if lent:
                return {inode: member.holders}
        return holders.find({inode})


def _waited_on(pids: Set[int], inodes: frozenset[int], serving: Set[int]) -> set[int]:
    """The listeners that a process waits on. A process that we may not inspect counts as waiting.

    Args:
        pids: the processes that hold the listeners. Each is looked at once, whatever their number.
        serving: processes that serve already. They may be too busy to be seen waiting, so it is
            enough if they have registered a listener with an epoll.
    """
    found: set[int] = set()
    for pid in pids & serving:
        found.update(waiting.waits(pid, inodes) or ())
    for pid in holders.first_of(pids):
        if rest := inodes - found:
            seen = waiting.waits_on_each(pid, rest)
            found.update(inode for inode, each in seen.items() if each is not waiting.Seen.NO)
    return found
