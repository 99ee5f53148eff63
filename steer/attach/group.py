"""The sockets of a server at one address, and the policy that selects among them."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager

from steer.attach import holders, older
from steer.attach.attachment import Attachment
from steer.attach.binds import listeners_at
from steer.attach.counting import CountingElsewhere
from steer.attach.freed import when_freed
from steer.attach.group_holders import GroupHolders
from steer.attach.handover import KeptGroup
from steer.attach.joining import Joining
from steer.attach.ownership import Ownership, OwnershipChecks
from steer.attach.replaced import ReplacedProgram
from steer.attach.roster import Member, Roster, Slots, State
from steer.attach.selection import Selection
from steer.attach.wording import BY_PROTOCOL
from steer.backends import backup
from steer.backends.base import Counts
from steer.backends.ebpf import Ebpf
from steer.backends.open import refuse_uncounted
from steer.config.plan import Plan
from steer.errors import Note
from steer.linux.log import Log
from steer.loader import foreign
from steer.sockets import group_program
from steer.sockets.sock_diag import Listener
from steer.values import plural, several

_NAMED_MAX = 8


class AttachedGroup:
    """A reuseport group of a server that steer did not start.

    Args:
        plan: for one address, on the backend ebpf.
        slots: where the group takes slots from; None: it has all of the plan.
        in_sockmap: whether to select from a sockmap, see `sockmap.is_needed`.

    Attributes:
        is_older_counted: whether connections that were accepted before the attach are counted.
        taken_by: what selects in place of our program, when that was last checked; None: ours.
        split: why our program does not select among all sockets, when that was last checked.
        is_detached: whether `detach` has succeeded.

    Raises:
        KernelError: the kernel refuses; nothing is attached.
    """

    def __init__(
        self, plan: Plan, log: Log, slots: Slots | None = None, in_sockmap: bool = False
    ) -> None:
        self.plan = plan
        self.in_sockmap = in_sockmap
        self.roster = Roster(slots or Slots(plan.slots))
        self.holders = GroupHolders(self.roster)
        (self.bind,) = plan.binds
        self.is_tcp = self.bind.protocol == "tcp"
        self.wording = BY_PROTOCOL[self.bind.protocol]
        self._log = log
        self._ownership = Ownership()
        self._ownership_checks = OwnershipChecks(self.bind.protocol)
        self.is_older_counted = False
        self._replaced: ReplacedProgram | None = None
        self.is_detached = False
        capacity = plan.slots + backup.COUNT
        with ExitStack() as undo:
            undo.callback(self._ownership_checks.close)
            self.attachment = Attachment(self.bind.port, capacity)
            undo.callback(self.attachment.close)
            self.counting = CountingElsewhere(capacity if self.is_tcp else 0)
            undo.callback(self.counting.close)
            refuse_uncounted(plan, self.counting)
            maps = self.attachment.maps
            self.backend = Ebpf(plan, False, self.counting, maps, in_sockmap)
            undo.callback(self.backend.close)
            self.selection = Selection(self.roster, self.holders, self.backend)
            self.joining = Joining(
                self.roster,
                self.holders,
                self.backend,
                self.attachment,
                self.counting,
                log,
                self.bind,
            )
            undo.callback(self.joining.close)
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
        self.holders.add_likely(likely)
        try:
            if replaced is not None:
                self._take_out(replaced)
            if left:
                self._join_in_place_of_another()
            else:
                self.joining.join_all(self.listeners())
            self.holders.look_at_waiters()
            self._count_older()
            for member in self.roster:
                member.state = State.READY
            self.selection.update(self.plan)
        except BaseException:
            self.detach()
            raise

    def succeed(self, kept: KeptGroup, replaced: ReplacedProgram | None) -> None:
        """Begin with what another attacher has let go. The kernel's hash selects meanwhile.

        Args:
            replaced: the program to put back when this is detached.

        Raises:
            KernelError: this cannot be done; the group is as it was before both attachers.
        """
        self._replaced = replaced
        self.joining.retired = kept.retired
        self.holders.add_likely(kept.pids)
        try:
            with self.roster.wanted({inode: each.slot for inode, each in kept.members.items()}):
                self.joining.join_new(self.listeners())
            for member in self.roster:
                if before := kept.members.get(member.listener.inode):
                    member.state, member.before = before.state, before.counts
            self.holders.look_at_waiters()
            self._count_older()
            self.selection.update(self.plan)
        except BaseException:
            self.detach()
            raise

    def begin_empty(self) -> None:
        """Begin before the server listens: `look` adds its listeners. Raises KernelError."""
        self._count_older()
        self.selection.update(self.plan)

    def counts(self, member: Member) -> Counts:
        return (self.backend.counts(member.slot) or Counts()) + member.before

    def _take_out(self, replaced: ReplacedProgram) -> None:
        """Attach our program before the other one loses its sockets. Our table is still empty, so
        the kernel's hash selects meanwhile. Raises KernelError."""
        self.backend.reattach(self._lend_any)
        self._replaced = replaced
        replaced.take_out()

    def _lend_any(self) -> AbstractContextManager[Mapping[int, socket.socket]]:
        return self.holders.lend_any(self.listeners().keys())

    def _join_in_place_of_another(self) -> None:
        """Detach the program of an attacher that was killed, then join. Raises KernelError."""
        with self._lend_any() as lent:
            for sock in lent.values():
                group_program.detach(sock.fileno())
        when_freed(lambda: self.joining.join_all(self.listeners()))

    def _count_older(self) -> None:
        """Count the connections that were accepted before the attach."""
        if not self.counting.sees_older:
            self.is_older_counted = not len(self.roster)
            self.counting.begin({}, {})
            return
        found = older.find(self.bind, self.roster, self.holders)
        fits = len(found.slots) <= self.counting.older_max
        self.is_older_counted = found.is_complete and fits
        self.counting.begin(found.slots, found.holders)

    def look(self) -> None:
        """Add and remove listeners that have been opened and closed. Raises KernelError."""
        there = listeners_at(self.bind)
        gone = self._mark_closing(there)
        self.joining.refusals.keep(there.keys())
        known = {each.listener.inode for each in self.roster}
        self.joining.join_new(there)
        joined = [each for each in self.roster if each.listener.inode not in known]
        admitted = self.roster.admit(self.holders.waited_on())
        self.selection.update(self.plan)
        for member in gone:
            self.joining.leave(member)
        self._tell_changes(joined, admitted, gone)

    def _tell_changes(self, *changed: Sequence[Member]) -> None:
        for found, what in zip(changed, ("joined", "ready", self.wording.gone), strict=True):
            if found:
                self._log.info("%s %s", self._named(found), what)

    def _detach_each(self) -> None:
        """Each group has our program."""
        with closing(holders.each_borrowed(self.holders.of(self.listeners().keys()))) as lent:
            for _, sock in lent:
                group_program.detach(sock.fileno())

    def _named(self, found: Sequence[Member]) -> str:
        if len(found) > _NAMED_MAX:
            return plural(len(found), self.wording.socket)
        return several(self.wording.socket, [each.slot for each in found])

    def _mark_closing(self, there: Collection[int]) -> Sequence[Member]:
        """Select no listener that closes. Returns: those that are closed."""
        for member in self.roster:
            if self.attachment.is_closing(member.slot):
                member.state = State.CLOSING
        gone = self.roster.gone(there)
        for member in gone:
            member.state = State.CLOSING
        return gone

    def listeners(self) -> Mapping[int, Listener]:
        """The listeners that exist now, by inode. Raises KernelError."""
        return listeners_at(self.bind)

    def drain(self, member: Member) -> None:
        member.state = State.DRAINING
        self.selection.update(self.plan)

    def undrain(self, member: Member) -> None:
        member.state = State.READY
        self.selection.update(self.plan)

    def swap(self, plan: Plan) -> None:
        """Raises KernelError: nothing has changed."""
        refuse_uncounted(plan, self.counting)
        self.selection.swap(plan)
        self.plan = plan

    @property
    def taken_by(self) -> Note | None:
        return self._ownership.taken

    @property
    def split(self) -> Note | None:
        return self._ownership.split

    def check_program(self) -> Note | None:
        """Find out whether another program selects by now, and which: the server may have attached
        its own; and whether the group is still one. Raises KernelError."""
        inodes = {each.listener.inode for each in self.roster}
        before, ours = self._ownership, foreign.number_of(self.backend.programs[0])
        self._ownership = self._ownership_checks.look(inodes, ours, self.wording)
        for was, found in ((before.taken, self.taken_by), (before.split, self.split)):
            if found and found != was:
                self._log.warning("%s", found)
            elif was and not found:
                self._log.info("%s go by the policy again", self.wording.traffic)
        return self.taken_by

    def detach(self) -> None:
        """Leave the group to the kernel's hash, or to the program that it had before; or to the one
        that it has, if that is not ours. A second call does nothing."""
        if self.is_detached:
            return
        is_taken = self.check_program() is not None
        lend = self.holders.lend if self._replaced is None else self._lend_any
        self.backend.detach(lend_none if is_taken else lend)
        if self.split:
            self._detach_each()
        if self._replaced is not None and not is_taken:
            there = self.listeners()
            with closing(holders.each_borrowed(self.holders.of(there.keys()))) as lent:
                self._replaced.put_back((there[inode].cookie, sock) for inode, sock in lent)
        self.is_detached = True


@contextmanager
def lend_none() -> Iterator[Mapping[int, socket.socket]]:
    yield {}
