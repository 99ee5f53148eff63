"""The listeners of a server at one address, and the policy that selects among them."""

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
"""The most connections to look for."""


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
    """A reuseport group of a server that steer did not start.

    Args:
        plan: for one address, on the backend ebpf.

    Attributes:
        retired: the counts of listeners that are gone.
        is_older_counted: whether connections that were accepted before the attach are counted.
        why_unwatched: why no program reports listeners that open and close; None: one does.

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
        """Add all listeners, and let the policy select among them.

        Args:
            likely: processes that probably hold the listeners.
            left: whether the group has the program of an attacher that was killed.
            replaced: the program that the group has, to be put back when this is detached.

        Raises:
            KernelError: one cannot be added; the group is as it was.
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
            self._select()
        except BaseException:
            self.detach()
            raise

    def _take_out(self, replaced: ReplacedProgram) -> None:
        """Attach our program before the other one loses its sockets. Our table is still empty, so
        the kernel's hash selects meanwhile. Raises KernelError."""
        self.backend.reattach(self._lend_any)
        self._replaced = replaced
        replaced.take_out()

    @contextmanager
    def _lend_any(self) -> Iterator[Mapping[int, socket.socket]]:
        with holders.borrowed(self._holders_of(self.listeners().keys())) as lent:
            yield dict(enumerate(list(lent.values())[:1]))

    def _join_in_place_of_another(self) -> None:
        """Detach the program of an attacher that was killed, then join.

        The listeners are still in its sockarray, and can be in one only. The kernel frees the
        sockarray some time after the program. Raises KernelError.
        """
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
        """The connections that were accepted before the attach.

        Returns:
            By inode, the slot of the listener that a holder of the connection waits on; and the
            holders.
        """
        if not self.counting.sees_older:
            return {}, {}
        family = socket.AF_INET6 if self._bind.is_v6 else socket.AF_INET
        accepted = sock_diag.connections(family, self._bind.port, _OLDER_MAX)
        pids = Counter(self.pid_of(each) for each in self.roster)
        # If a process waits on several listeners, the connection may be from any of them.
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
        """Add and remove listeners that have been opened and closed. Raises KernelError."""
        there = listeners_at(self._bind)
        before = self.roster.selected
        for member in self.roster:
            if self.attachment.is_closing(member.slot):
                member.state = State.CLOSING
        gone = self.roster.gone(there)
        for member in gone:
            member.state = State.CLOSING
        self._join_new([each for each in self.roster.new(there) if each.inode not in self._refused])
        self._refused &= there.keys()
        self._admit()
        if self.roster.selected != before:
            self._select()
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
        """Look first at processes that hold others: to look at all takes far longer."""
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
        try:
            slot = self.roster.free_slot()
        except LookupError:
            cause = f"all {self.plan.slots} slots are taken"
            raise KernelError("add a listener", cause, "attach again, with room for more") from None
        self.backend.take_counts(slot)
        # Clear the mark first: a listener in the sockarray may be selected at once.
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
        """The processes that hold a selected listener which no other process holds."""
        owners = ({holder.pid for holder in each.holders} for each in self.roster.selected)
        return frozenset(min(pids) for pids in owners if len(pids) == 1)

    def listeners(self) -> Mapping[int, Listener]:
        """The listeners that exist now, by inode. Raises KernelError."""
        return listeners_at(self._bind)

    @property
    def is_held_together(self) -> bool:
        """Whether several processes hold the same listener."""
        return len(self.roster) > 1 and any(
            len({holder.pid for holder in each.holders}) > 1 for each in self.roster
        )

    def pid_of(self, member: Member) -> int | None:
        """The process that waits on the listener, or waited when it was last seen to; otherwise one
        that holds it."""
        pids = {each.pid for each in member.holders}
        if len(pids) > 1 and member.pid not in pids:
            inodes = frozenset({member.listener.inode})
            seen = (waiting.waiters(pid, inodes) for pid in holders.first_of(pids))
            member.pid = min(frozenset[int]().union(*seen), default=None)
        return member.pid or min(pids, default=None)

    def _select(self) -> None:
        self.backend.steer([self._member(self.plan, each) for each in self.roster.selected])

    def _member(self, plan: Plan, member: Member) -> layout.Member:
        allowed = plan.topology.allowed
        cpu = allowed[member.slot % len(allowed)] if plan.policy.pinned else None
        return layout.Member(member.slot, plan.service.weight(member.slot), cpu)

    def drain(self, member: Member) -> None:
        member.state = State.DRAINING
        self._select()

    def undrain(self, member: Member) -> None:
        member.state = State.READY
        self._select()

    def swap(self, plan: Plan) -> None:
        """Raises KernelError: nothing has changed."""
        refuse_uncounted(plan, self.counting)
        members = [self._member(plan, each) for each in self.roster.selected]
        self.backend.swap(plan, members, self._lend)
        self.plan = plan

    @contextmanager
    def _lend(self) -> Iterator[Mapping[int, socket.socket]]:
        """Lend any member of the group."""
        for each in self.roster:
            with holders.borrowed(self._holders_of_member(each)) as lent:
                if lent:
                    yield {0: lent[each.listener.inode]}
                    return
        yield {}

    def _holders_of_member(self, member: Member) -> Mapping[int, Sequence[Holder]]:
        """The processes that held the listener when it joined; others if they have closed it."""
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
    """Whether a process waits on the listener. A process that we may not inspect counts as waiting.

    Args:
        serving: processes that serve already. They may be too busy to be seen waiting, so it is
            enough if they have registered the listener with an epoll.
    """
    pids, inode = {each.pid for each in member.holders}, member.listener.inode
    if any(waiting.waits(pid, frozenset({inode})) for pid in pids & serving):
        return True
    return any(
        waiting.waits_on(pid, frozenset({inode})) is not waiting.Seen.NO
        for pid in holders.first_of(pids)
    )
