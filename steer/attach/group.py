"""The listeners of a server at one address, and the policy that selects among them."""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, contextmanager

from steer.attach import holders, ownership, refusals
from steer.attach.attachment import Attachment
from steer.attach.counting import CountingElsewhere
from steer.attach.holders import Holder
from steer.attach.refusals import Refusals
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
from steer.linux import processes, waiting
from steer.linux.log import Log
from steer.linux.procfs import Files
from steer.loader import foreign
from steer.policy import layout
from steer.sockets import group_program, members, reuseport, sock_diag
from steer.sockets.sock_diag import Listener
from steer.values import plural, several

_FREED_S, _AGAIN_S = 5.0, 0.01
_NAMED_MAX = 8
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
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
        refusals: the listeners that could not join.
        without_room: how many more listeners there were in the last look than slots.
        taken_by: what selects in place of our program, when that was last checked; None: ours.
        why_unwatched: why no program reports listeners that open and close; None: one does.

    Raises:
        KernelError: the kernel refuses; nothing is attached.
    """

    def __init__(self, plan: Plan, log: Log) -> None:
        self.plan = plan
        self.roster = Roster(plan.slots)
        (self._bind,) = plan.binds
        self._log = log
        self.refusals = Refusals()
        self.taken_by: Note | None = None
        self.without_room = 0
        self._selected: list[int] | None = None
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
                self._join_all()
            self._look_at_waiters()
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
        held = self._holders_of(self.listeners().keys())
        with closing(holders.each_borrowed(held)) as lent:
            first = next(lent, None)
            yield {0: first[1]} if first else {}

    def _join_in_place_of_another(self) -> None:
        """Detach the program of an attacher that was killed, then join.

        The listeners are still in its sockarray, and can be in one only. The kernel frees the
        sockarray some time after the program. Raises KernelError.
        """
        end_s = time.monotonic() + _FREED_S
        with self._lend_any() as lent:
            for sock in lent.values():
                group_program.detach(sock.fileno())
        while True:
            try:
                self._join_all()
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
        self.is_older_counted &= len(older) <= self.counting.older_max
        return older, held

    def look(self) -> None:
        """Add and remove listeners that have been opened and closed. Raises KernelError."""
        there = listeners_at(self._bind)
        gone = self._mark_closing(there)
        self.refusals.keep(there.keys())
        known = {each.listener.inode for each in self.roster}
        self._join_new(there)
        joined = [each for each in self.roster if each.listener.inode not in known]
        admitted = self._admit()
        self._select_if_changed()
        for member in gone:
            self._leave(member)
        self._tell_changes(joined, admitted, gone)

    def _tell_changes(self, *changed: Sequence[Member]) -> None:
        for found, what in zip(changed, ("joined", "ready", "closed"), strict=True):
            if found:
                self._log.info("%s %s", _named(found), what)

    def _mark_closing(self, there: Collection[int]) -> Sequence[Member]:
        """Select no listener that closes. Returns: those that are closed."""
        for member in self.roster:
            if self.attachment.is_closing(member.slot):
                member.state = State.CLOSING
        gone = self.roster.gone(there)
        for member in gone:
            member.state = State.CLOSING
        return gone

    def _join_new(self, there: Mapping[int, Listener]) -> None:
        """Join as many as fit. The others are tried again, those that were refused after a pause:
        what is short now may not be so later."""
        now_s, room = time.monotonic(), self.roster.room
        found = [each for each in self.roster.new(there) if self.refusals.is_due(each.inode, now_s)]
        if found[:room]:
            self._join(found[:room])
        self._tell_room(len(found[room:]))
        for why, refused in self.refusals.untold().items():
            self._log.warning("%s; tried again from time to time", refusals.in_words(why, refused))

    def _tell_room(self, without: int) -> None:
        if without and not self.without_room:
            self._log.warning("%s", refusals.full_in_words(self.roster.capacity, without))
        self.without_room = without

    @property
    def has_new_room(self) -> bool:
        """Whether a listener that did not fit in the last look does now."""
        return bool(self.without_room and self.roster.room)

    def _join_all(self) -> None:
        """Raises KernelError: one of the listeners cannot join."""
        found = self.roster.new(self.listeners())
        for error in self._join(found[: self.roster.room]):
            raise error

    def _join(self, found: Sequence[Listener]) -> Sequence[KernelError]:
        """Let listeners join. Returns: why some of them cannot."""
        held = self._holders_of({each.inode for each in found})
        errors = []
        try:
            self._watch({each.cgroup for each in found if each.inode in held})
        except KernelError as error:
            for each in found:
                self._refuse(each, error.note, held.get(each.inode, ()))
            return [error]
        for each in found:
            try:
                self._borrow_and_join(each, held.get(each.inode, ()))
            except KernelError as error:
                self._refuse(each, error.note, held.get(each.inode, ()))
                errors.append(error)
        return errors

    def _borrow_and_join(self, listener: Listener, held: Sequence[Holder]) -> None:
        """Raises KernelError: it cannot join."""
        if not held:
            self._refuse(listener, refusals.HIDDEN, ())
            return
        # One at a time, so that any number of listeners fits into the limit on open files.
        with holders.borrowed({listener.inode: held}) as lent:
            for sock in lent.values():
                self._join_one(listener, held, sock)
                self.refusals.remove(listener.inode)

    def _refuse(self, listener: Listener, why: Note, held: Sequence[Holder]) -> None:
        pids = [each.pid for each in held]
        self.refusals.add(listener.inode, why, pids, time.monotonic())

    def _holders_of(self, inodes: Set[int]) -> Mapping[int, Sequence[Holder]]:
        return self._find_holders(inodes, self._known_pids())

    def _known_pids(self) -> frozenset[int]:
        """Processes that held listeners when they were last looked at."""
        held = (holder.pid for each in self.roster for holder in each.holders)
        return frozenset(self._likely.union(held))

    def _find_holders(
        self, inodes: Set[int], likely: Iterable[int]
    ) -> Mapping[int, Sequence[Holder]]:
        """Look first at processes that are likely to hold them: to look at all takes far longer."""
        held = holders.find(inodes, likely)
        rest = inodes - held.keys()
        return {**held, **holders.find(rest)} if rest else held

    def _watch(self, cgroups: set[int]) -> None:
        """Raises KernelError: something is short that may not be later."""
        self.counting.watch_cgroups(cgroups)
        if self.watch is not None:
            try:
                self.watch.on(cgroups)
            except KernelError as error:
                if error.errno in _SHORT:
                    raise
                self.watch.close()
                self.watch, self.why_unwatched = None, error.note

    def _join_one(self, listener: Listener, held: Sequence[Holder], sock: socket.socket) -> None:
        """Raises KernelError."""
        if not members.shares(sock):
            raise refusals.unshared(errno.EINVAL)
        slot = self.roster.free_slot()
        self.backend.take_counts(slot)
        # Clear the mark first: a listener in the sockarray may be selected at once.
        self.attachment.joins(slot, listener.cookie)
        try:
            self.backend.add_member(slot, [reuseport.duplicate(sock.fileno()).detach()])
        except BaseException as error:
            self.attachment.leaves(listener.cookie)
            self.backend.remove_member(slot)
            if isinstance(error, KernelError) and error.errno == errno.EBUSY:
                raise refusals.in_another_array(errno.EBUSY) from None
            raise
        self.roster.add(listener, held, time.monotonic(), slot)

    def _leave(self, member: Member) -> None:
        self.attachment.leaves(member.listener.cookie)
        self.backend.remove_member(member.slot)
        self.roster.remove(member)
        self.retired += self.backend.take_counts(member.slot) or Counts()

    def _admit(self) -> Sequence[Member]:
        starting = self.roster.starting
        serving = self._serving() if starting else frozenset[int]()
        waited_on = {each.listener.inode for each in starting if _is_waited_on(each, serving)}
        return self.roster.admit(waited_on)

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
        """The process that waits on the listener; if none was seen to, one that holds it."""
        pids = {each.pid for each in member.holders}
        return member.pid if member.pid in pids else min(pids, default=None)

    def look_at_holders(self) -> None:
        """Find out which processes hold the listeners now, and which of them wait: a server may
        have replaced its workers since, and given them the same listeners."""
        known = self._known_pids()
        parents = holders.first_of(known)
        family = {each for pid in parents for each in processes.family(pid, Files("/proc"))}
        held = self._find_holders({each.listener.inode for each in self.roster}, known | family)
        for member in self.roster:
            member.holders = held.get(member.listener.inode, ())
        self._look_at_waiters()

    def _look_at_waiters(self) -> None:
        waiters = holders.waiters({each.listener.inode: each.holders for each in self.roster})
        for member in self.roster:
            member.pid = waiters.get(member.listener.inode, member.pid)

    def _select(self) -> None:
        selected = self.roster.selected
        self.backend.steer([self._member(self.plan, each) for each in selected])
        self._selected = [each.slot for each in selected]

    def _select_if_changed(self) -> None:
        if [each.slot for each in self.roster.selected] != self._selected:
            self._select()

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
        selected = [self._member(plan, each) for each in self.roster.selected]
        self.backend.swap(plan, selected, self._lend)
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

    def check_program(self) -> Note | None:
        """Find out whether another program selects by now, and which: the server may have attached
        its own. Raises KernelError."""
        inodes = {each.listener.inode for each in self.roster}
        before, ours = self.taken_by, foreign.number_of(self.backend.programs[0])
        self.taken_by = ownership.taken_by(inodes, ours)
        if self.taken_by != before:
            if self.taken_by:
                self._log.warning("%s", self.taken_by)
            else:
                self._log.info("connections go by the policy again")
        return self.taken_by

    def detach(self) -> None:
        """Leave the group to the kernel's hash, or to the program that it had before; or to the one
        that it has, if that is not ours. A second call does nothing."""
        if self._is_detached:
            return
        is_taken = self.check_program() is not None
        lend = self._lend if self._replaced is None else self._lend_any
        self.backend.detach(_lend_none if is_taken else lend)
        if self._replaced is not None and not is_taken:
            there = self.listeners()
            with closing(holders.each_borrowed(self._holders_of(there.keys()))) as lent:
                self._replaced.put_back((there[inode].cookie, sock) for inode, sock in lent)
        self._is_detached = True


def _named(found: Sequence[Member]) -> str:
    if len(found) > _NAMED_MAX:
        return plural(len(found), "listener")
    return several("listener", [each.slot for each in found])


@contextmanager
def _lend_none() -> Iterator[Mapping[int, socket.socket]]:
    yield {}


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
