"""How listeners join an attached group and leave it."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

from steer.attach import holders, refusals
from steer.attach.attachment import Attachment
from steer.attach.counting import CountingElsewhere
from steer.attach.group_holders import GroupHolders
from steer.attach.holders import Holder
from steer.attach.refusals import Refusals
from steer.attach.roster import Member, Roster
from steer.attach.watch import Watch
from steer.attach.wording import BY_PROTOCOL
from steer.backends.base import Counts
from steer.backends.ebpf import Ebpf
from steer.config.address import Bind
from steer.errors import KernelError, Note
from steer.linux.log import Log
from steer.sockets import members, reuseport
from steer.sockets.sock_diag import Listener


class Joining:
    """Lets the listeners of one group join it and leave it.

    Attributes:
        refusals: the listeners that could not join.
        without_room: how many more listeners there were in the last look than slots.
        watch, why_unwatched: reports listeners that open and close; or why no program does.
        retired: the counts of listeners that have left.
    """

    def __init__(
        self,
        roster: Roster,
        group_holders: GroupHolders,
        backend: Ebpf,
        attachment: Attachment,
        counting: CountingElsewhere,
        log: Log,
        bind: Bind,
    ) -> None:
        self._wording = BY_PROTOCOL[bind.protocol]
        self._roster = roster
        self._holders = group_holders
        self._backend = backend
        self._attachment = attachment
        self._counting = counting
        self._log = log
        self.refusals = Refusals()
        self.without_room = 0
        self.retired = Counts()
        self.watch: Watch | None = None
        self.why_unwatched: Note | None = None
        with ExitStack() as undo:
            try:
                self.watch = undo.enter_context(closing(Watch(attachment, bind)))
            except KernelError as error:
                self.why_unwatched = error.note
            self.close = undo.pop_all().close

    @property
    def has_new_room(self) -> bool:
        """Whether a listener that did not fit in the last look does now."""
        return bool(self.without_room and self._roster.room)

    def join_new(self, there: Mapping[int, Listener]) -> None:
        """Join as many as fit. The others are tried again, those that were refused after a pause:
        what is short now may not be so later."""
        now_s, room = time.monotonic(), self._roster.room
        found = [
            each for each in self._roster.new(there) if self.refusals.is_due(each.inode, now_s)
        ]
        if found[:room]:
            self._join(found[:room])
        self._tell_room(len(found[room:]))
        for why, refused in self.refusals.untold().items():
            words = refusals.in_words(why, refused, self._wording)
            self._log.warning("%s; tried again from time to time", words)

    def _tell_room(self, without: int) -> None:
        if without and not self.without_room:
            capacity, wording = self._roster.capacity, self._wording
            self._log.warning("%s", refusals.full_in_words(capacity, without, wording))
        self.without_room = without

    def join_all(self, there: Mapping[int, Listener]) -> None:
        """Raises KernelError: one of the listeners cannot join."""
        found = self._roster.new(there)
        for error in self._join(found[: self._roster.room]):
            raise error

    def _join(self, found: Sequence[Listener]) -> Sequence[KernelError]:
        """Let listeners join. Returns: why some of them cannot."""
        held = self._holders.of({each.inode for each in found})
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

    def _watch(self, cgroups: set[int]) -> None:
        """Raises KernelError: something is short that may not be later."""
        self._counting.watch_cgroups(cgroups)
        if self.watch is not None:
            try:
                self.watch.on(cgroups)
            except KernelError as error:
                if refusals.is_short(error):
                    raise
                self.watch.close()
                self.watch, self.why_unwatched = None, error.note

    def _join_one(self, listener: Listener, held: Sequence[Holder], sock: socket.socket) -> None:
        """Raises KernelError."""
        if not members.shares(sock):
            raise refusals.unshared(errno.EINVAL)
        slot = self._roster.free_slot(listener.inode)
        self._backend.take_counts(slot)
        # Clear the mark first: a listener in the sockarray may be selected at once.
        self._attachment.joins(slot, listener.cookie)
        try:
            self._backend.add_member(slot, [reuseport.duplicate(sock.fileno()).detach()])
        except BaseException as error:
            self._attachment.leaves(listener.cookie)
            self._backend.remove_member(slot)
            number = error.errno if isinstance(error, KernelError) else None
            if number and number in refusals.BY_ERRNO:
                raise refusals.BY_ERRNO[number](number) from None
            raise
        self._roster.add(listener, held, time.monotonic(), slot)

    def leave(self, member: Member) -> None:
        self._attachment.leaves(member.listener.cookie)
        self._backend.remove_member(member.slot)
        self._roster.remove(member)
        self.retired += self._backend.take_counts(member.slot) or Counts()
        self.retired += member.before
