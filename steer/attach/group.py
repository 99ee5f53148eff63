"""The listeners of other services at one address, chosen among by a policy."""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, contextmanager

from steer.attach import holders
from steer.attach.attachment import Attachment
from steer.attach.counting import CountingElsewhere
from steer.attach.holders import Holder
from steer.attach.replaced import ReplacedProgram
from steer.attach.roster import Member, Roster, State
from steer.attach.watch import Watch
from steer.backends import backup
from steer.backends.base import Counts
from steer.backends.ebpf import Ebpf
from steer.backends.open import refuse_uncounted
from steer.config.address import Bind
from steer.config.plan import Plan
from steer.errors import KernelError, Note
from steer.linux import waiting
from steer.linux.log import Log
from steer.policy import layout
from steer.sockets import group_program, reuseport, sock_diag
from steer.sockets.sock_diag import Listener

_FREED_S, _AGAIN_S = 5.0, 0.01
_OLDER_MAX = 4096
"""Connections that are looked for."""


def listeners_at(bind: Bind) -> dict[int, Listener]:
    """The TCP listeners at exactly this address, by inode. Raises KernelError."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    address = socket.inet_pton(family, bind.address)
    return {
        each.inode: each
        for each in sock_diag.listeners(family, bind.port)
        if each.address == address and not each.device
    }


class AttachedGroup:
    """From `open` until `detach`.

    Args:
        plan: for the address, with one backend, ebpf.

    Attributes:
        retired: what was counted for listeners that are gone.
        is_older_counted: whether connections are counted that were accepted before the attach.
        why_unwatched: why nothing is heard of listeners that come and go, but in `look`; None if
            it is.

    Raises:
        KernelError: the kernel refuses; nothing is attached.
    """

    def __init__(self, plan: Plan, log: Log) -> None:
        self.plan = plan
        self.roster = Roster(plan.slots)
        (self._bind,) = plan.binds
        self._log = log
        self._refused: set[int] = set()
        self._likely: set[int] = set()
        self.is_older_counted = False
        self.retired = Counts()
        self._replaced: ReplacedProgram | None = None
        self._is_detached = False
        self.watch: Watch | None = None
        self.why_unwatched: Note | None = None
        capacity = plan.slots + backup.COUNT
        with ExitStack() as undo:
            self.attachment = Attachment(self._bind.port, capacity)
            undo.callback(self.attachment.close)
            self.counting = CountingElsewhere(capacity)
            undo.callback(self.counting.close)
            refuse_uncounted(plan, self.counting)
            self.backend = Ebpf(plan, counting=self.counting, attachment=self.attachment.maps)
            undo.callback(self.backend.close)
            try:
                self.watch = undo.enter_context(closing(Watch(self.attachment)))
            except KernelError as error:
                self.why_unwatched = error.note
            self.close = undo.pop_all().close

    def begin(
        self,
        likely: Iterable[int] = (),
        left: bool = False,
        replaced: ReplacedProgram | None = None,
    ) -> None:
        """Take in all that there are.

        Args:
            likely: processes that probably have them open.
            left: whether the group has the program of an attacher that was killed.
            replaced: the program that the group has, to be put back when this is detached.

        Raises:
            KernelError: not all can be; the group is as it was.
        """
        self._likely.update(likely)
        try:
            if replaced is not None:
                self._take_out(replaced)
            if left:
                self._join_in_place_of_another()
            else:
                self._join(self.roster.new(self.listeners()))
            self.counting.begin(*self._older())
            for member in self.roster:
                member.state = State.READY
            self._choose()
        except BaseException:
            self.detach()
            raise

    def _take_out(self, replaced: ReplacedProgram) -> None:
        """First our program, which leaves the selection to the kernel's hash as yet: so no
        connection meets theirs without its sockets. Raises KernelError."""
        self.backend.reattach(self._lend_any)
        self._replaced = replaced
        replaced.take_out()

    @contextmanager
    def _lend_any(self) -> Iterator[Mapping[int, socket.socket]]:
        with holders.borrowed(self._holders_of(self.listeners().keys())) as lent:
            yield dict(enumerate(list(lent.values())[:1]))

    def _join_in_place_of_another(self) -> None:
        """With its program, which is freed after a grace period, goes the sockarray that the
        listeners are in: until then they cannot be in another. Raises KernelError."""
        end_s = time.monotonic() + _FREED_S
        there = self.listeners()
        with holders.borrowed(self._holders_of(there.keys())) as lent:
            for sock in list(lent.values())[:1]:
                group_program.detach(sock.fileno())
        while True:
            try:
                self._join(self.roster.new(self.listeners()))
                return
            except KernelError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end_s:
                    raise
            time.sleep(_AGAIN_S)

    def _older(self) -> tuple[Mapping[int, int], Mapping[int, Sequence[Holder]]]:
        """The connections that were accepted before, by inode: the slot whose listener the process
        waits on that has the connection; and who that is."""
        if not self.counting.sees_older:
            return {}, {}
        family = socket.AF_INET6 if self._bind.is_v6 else socket.AF_INET
        accepted = sock_diag.connections(family, self._bind.port, _OLDER_MAX)
        pids = Counter(self.pid_of(each) for each in self.roster)
        # Of a process that waits on several, nobody can tell which one a connection came from.
        slots = {pid: each.slot for each in self.roster if pids[pid := self.pid_of(each)] == 1}
        known = {holder.pid for each in self.roster for holder in each.holders}
        held = holders.find({each.inode for each in accepted}, known) if accepted else {}
        self.is_older_counted = all(
            any(holder.pid in slots for holder in held_by) for held_by in held.values()
        )
        older = {
            inode: slots[holder.pid]
            for inode, held_by in held.items()
            for holder in held_by
            if holder.pid in slots
        }
        return older, held

    def look(self) -> None:
        """Bring what is known up to date with what is there. Raises KernelError."""
        there = listeners_at(self._bind)
        before = self.roster.chosen
        for member in self.roster:
            if self.attachment.is_closing(member.slot):
                member.state = State.CLOSING
        gone = self.roster.gone(there)
        for member in gone:
            member.state = State.CLOSING
        self._join_new([each for each in self.roster.new(there) if each.inode not in self._refused])
        self._refused &= there.keys()
        self._admit()
        if self.roster.chosen != before:
            self._choose()
        for member in gone:
            self._leave(member)

    def _join_new(self, found: Sequence[Listener]) -> None:
        try:
            if found:
                self._join(found)
        except KernelError as error:
            self._refused.update(each.inode for each in found)
            self._log.warning("a new listener is not steered: %s", error)

    def _join(self, found: Sequence[Listener]) -> None:
        """Raises KernelError."""
        held = self._holders_of({each.inode for each in found})
        with holders.borrowed(held) as lent:
            self._watch({each.cgroup for each in found if each.inode in lent})
            for each in found:
                if each.inode in lent:
                    self._join_one(each, held[each.inode], lent[each.inode])

    def _holders_of(self, inodes: Set[int]) -> Mapping[int, Sequence[Holder]]:
        """First among processes that had others, as to look through all takes far longer."""
        known = self._likely.union(holder.pid for each in self.roster for holder in each.holders)
        held = holders.find(inodes, known)
        rest = inodes - held.keys()
        return {**held, **holders.find(rest)} if rest else held

    def _watch(self, cgroups: set[int]) -> None:
        self.counting.watch_cgroups(cgroups)
        if self.watch is not None:
            try:
                self.watch.on(cgroups)
            except KernelError as error:
                self.watch.close()
                self.watch, self.why_unwatched = None, error.note

    def _join_one(self, listener: Listener, held: Sequence[Holder], sock: socket.socket) -> None:
        """Raises KernelError."""
        slot = self.roster.free_slot()
        self.backend.take_counts(slot)
        # Its mark first: from the moment that it is in the sockarray it may be chosen.
        self.attachment.joins(slot, listener.cookie)
        try:
            self.backend.add_member(slot, [reuseport.duplicate(sock.fileno()).detach()])
        except BaseException:
            self.attachment.leaves(listener.cookie)
            self.backend.remove_member(slot)
            raise
        self.roster.add(listener, held, time.monotonic(), slot)

    def _leave(self, member: Member) -> None:
        self.attachment.leaves(member.listener.cookie)
        self.backend.remove_member(member.slot)
        self.roster.remove(member)
        self.retired += self.backend.take_counts(member.slot) or Counts()

    def _admit(self) -> None:
        starting = self.roster.starting
        serving = self._serving() if starting else frozenset[int]()
        waited_on = {each.listener.inode for each in starting if _is_waited_on(each, serving)}
        self.roster.admit(waited_on)

    def _serving(self) -> frozenset[int]:
        """Processes that alone have a listener that is chosen."""
        owners = ({holder.pid for holder in each.holders} for each in self.roster.chosen)
        return frozenset(min(pids) for pids in owners if len(pids) == 1)

    def listeners(self) -> Mapping[int, Listener]:
        """Those that are there now, by inode. Raises KernelError."""
        return listeners_at(self._bind)

    @property
    def is_held_together(self) -> bool:
        """Whether a process has open what another one waits on."""
        return len(self.roster) > 1 and any(
            len({holder.pid for holder in each.holders}) > 1 for each in self.roster
        )

    def pid_of(self, member: Member) -> int | None:
        """The process that waits on it, or did so when it was last seen to; else one that has it
        open."""
        pids = {each.pid for each in member.holders}
        if len(pids) > 1 and member.pid not in pids:
            inodes = frozenset({member.listener.inode})
            seen = (waiting.waiters(pid, inodes) for pid in holders.first_of(pids))
            member.pid = min(frozenset[int]().union(*seen), default=None)
        return member.pid or min(pids, default=None)

    def _choose(self) -> None:
        self.backend.steer([self._member(self.plan, each) for each in self.roster.chosen])

    def _member(self, plan: Plan, member: Member) -> layout.Member:
        allowed = plan.topology.allowed
        cpu = allowed[member.slot % len(allowed)] if plan.policy.pinned else None
        return layout.Member(member.slot, plan.service.weight(member.slot), cpu)

    def drain(self, member: Member) -> None:
        member.state = State.DRAINING
        self._choose()

    def undrain(self, member: Member) -> None:
        member.state = State.READY
        self._choose()

    def swap(self, plan: Plan) -> None:
        """Raises KernelError: nothing has changed."""
        refuse_uncounted(plan, self.counting)
        members = [self._member(plan, each) for each in self.roster.chosen]
        self.backend.swap(plan, members, self._lend)
        self.plan = plan

    @contextmanager
    def _lend(self) -> Iterator[Mapping[int, socket.socket]]:
        """Any member, to reach the group through."""
        for each in self.roster:
            with holders.borrowed(self._holders_of_member(each)) as lent:
                if lent:
                    yield {0: lent[each.listener.inode]}
                    return
        yield {}

    def _holders_of_member(self, member: Member) -> Mapping[int, Sequence[Holder]]:
        """Those that had it when it joined; others if they have all closed it."""
        inode = member.listener.inode
        with holders.borrowed({inode: member.holders}) as lent:
            if lent:
                return {inode: member.holders}
        return holders.find({inode})

    def detach(self) -> None:
        """Leave the group to the kernel's hash, or to the program that it had before. A second
        call does nothing."""
        if self._is_detached:
            return
        self.backend.detach(self._lend if self._replaced is None else self._lend_any)
        if self._replaced is not None:
            there = self.listeners()
            with holders.borrowed(self._holders_of(there.keys())) as lent:
                self._replaced.put_back({there[inode].cookie: sock for inode, sock in lent.items()})
        self._is_detached = True


def _is_waited_on(member: Member, serving: Set[int]) -> bool:
    """Whether a process is seen to wait on it; what cannot be looked at counts as if.

    Args:
        serving: processes that have others. Such a one may be too busy to be seen waiting.
    """
    pids, inode = {each.pid for each in member.holders}, member.listener.inode
    if any(waiting.waits(pid, frozenset({inode})) for pid in pids & serving):
        return True
    return any(
        waiting.waits_on(pid, frozenset({inode})) is not waiting.Seen.NO
        for pid in holders.first_of(pids)
    )
