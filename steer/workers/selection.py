"""The selection: the slots of a service, those of them that are selected now, and by what.

All that changes in one turn of the loop is one flip.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from steer.backends.base import Backend, Counts
from steer.config.address import Bind
from steer.config.plan import Plan
from steer.config.service import Service
from steer.errors import BindError, ControlError, KernelError, SteerError
from steer.guard.client import GuardClient
from steer.guard.store import STEERING
from steer.linux.log import Log
from steer.linux.retry import AGAIN_S, Retry
from steer.loader import shared_memory
from steer.policy.builtin import KERNEL
from steer.policy.layout import Member
from steer.sockets import listeners, reuseport
from steer.workers.handle import WorkerHandle

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Handle, Task

_AGAIN_S = 0.1
_Sockets = Mapping[int, socket.socket]
"""By bind."""


class Saved(msgspec.Struct, frozen=True):
    """The steering, what was counted, and the next slot, as another controller left them."""

    value: Any
    retired: Counts
    next_slot: int


class Selection:
    """Which workers are chosen, on which backend, and what that has to remember.

    Slots can be taken and joined at once; to flip it takes a loop, see `watch`.

    Args:
        places: all that have a slot, at any time: others add to them and remove.
        slots: capacity; a slot is below it.
        guard: has all that another controller needs.

    Attributes:
        steering: the backend in force.
        retired: what was counted for slots since given up.
    """

    def __init__(
        self,
        steering: Backend,
        places: Collection[WorkerHandle],
        slots: int,
        guard: GuardClient,
        log: Log,
        retry: Retry,
    ) -> None:
        self.steering = steering
        self.retired = Counts()
        self._places = places
        self._slots = slots
        self._next_slot = 0
        self._taken: set[int] = set()
        self._ended: set[int] = set()
        self._let_go: set[int] = set()
        self._guard = guard
        self._log = log
        self._retry = retry
        self._flip_due: Handle | None = None
        self._keep_due = self._is_kept = self._is_kept_together = False
        self._told_flipped: list[Future[None]] = []
        self._flips = self._settled = 0
        self._awaiting: list[tuple[str, Callable[[], object], int]] = []
        self._waiting: Task[None] | None = None
        self._released = False
        self._loop: AbstractEventLoop | None = None

    # For another controller.

    def keep(self) -> None:
        """Have the guard know how it is now."""
        self._is_kept = True
        value, fds = self.steering.saved()
        saved = Saved(value, self.retired, self._next_slot)
        self._guard.put(STEERING, msgspec.json.encode(saved), fds)

    def _keep_soon(self) -> None:
        """Once for all that changes in one turn of the loop, as who is killed meanwhile leaves
        what can be adopted all the same: a slot that was taken is not taken again, as its worker
        is known, and who is chosen is found anew."""
        if self._released:
            return
        if not self._is_kept:
            self.keep()
        elif not self._keep_due:
            self._keep_due = True
            if self._loop is not None:  # else see `watch`
                self._loop.call_soon(self.keep_if_due)

    def _keep_order(self) -> None:
        """At once, or see `together`: in which order the kernel has sockets nobody else can
        tell."""
        if self.steering.needs_order and not self._is_kept_together and not self._released:
            self.keep()
        else:
            self._keep_soon()

    @contextmanager
    def together(self) -> Iterator[Mapping[int, int]]:
        """Where the order of sockets matters the guard is told it once for all who join, or
        leave, meanwhile, and not once for each: it is told that of all others, too.

        Who is killed meanwhile leaves what can be adopted. Those who join are not forked before
        the end: their sockets, the last in the order, go with us, and what the guard knows is
        right again. Of those who leave it must have no sockets any more: who adopts us takes them
        out of the order that it knows, from the first on, and so they are to leave. But sockets
        of our own move as well, and who adopts us has to have them: where there are any, each
        change is told at once.

        Yields:
            by slot, the index in the order that the guard knows.
        """
        knows = self.steering.needs_order and not self.steering.own_sockets
        order = self.steering.order if knows else None
        self._is_kept_together = order is not None
        try:
            yield {slot: index for index, slot in enumerate(order or ())}
        finally:
            if self._is_kept_together:
                self._is_kept_together = False
                self.keep_if_due()

    def keep_if_due(self) -> None:
        """Do not wait for the next turn of the loop: there may be none."""
        if self._keep_due:
            self._keep_in_its_turn()

    def _keep_in_its_turn(self) -> None:
        self._keep_due = False
        if not self._released:
            self._retry.until_done("have the guard know who is chosen", self.keep)

    def restore(self, saved: Saved, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        """Go on where another controller stopped.

        Args:
            fds: kept with what it saved; they become ours.
            held: by slots that are still taken, the descriptors it held of each.
        """
        self.retired, self._next_slot = saved.retired, saved.next_slot
        self._taken = set(held)
        self.steering.restore(saved.value, fds, held)
        # One may have been on its way out, and its slot not yet given up.
        for slot in set(range(self._slots)).difference(held):
            self._put_aside(slot)
        try:
            with self._borrow_all() as there:
                self.steering.reassert(there)
        except KernelError as error:
            self._log.warning("not seen whether the kernel steers as it should: %s", error)

    # Slots.

    def take_slot(self) -> int:
        """A slot that nobody has, the next one round.

        Not one that was just given up: what still speaks of that means the worker that
        died.

        Raises:
            ControlError
        """
        taken = self._taken
        if len(taken) >= self._slots:
            raise ControlError(
                "start a worker", f"all {self._slots} slots are taken", "some still finish: wait"
            )
        while self._next_slot in taken:
            self._next_slot = (self._next_slot + 1) % self._slots
        slot = self._next_slot
        self._next_slot = (slot + 1) % self._slots
        taken.add(slot)
        return slot

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """A new worker's sockets; see `Backend.joined`. Raises KernelError."""
        with self.naming_locked():
            self.steering.joined(slot, fds)
        self._keep_order()

    def left(self, slot: int) -> None:
        """The worker there has ended."""
        with self.naming_locked():
            self.steering.left(slot)
        self._keep_order()

    def give_up(self, slot: int) -> None:
        """It is nobody's any more; what was counted for it is put aside."""
        self._put_aside(slot)
        self._taken.discard(slot)
        self._ended.discard(slot)
        self._keep_soon()

    def _put_aside(self, slot: int) -> None:
        self.retired += self.steering.retire(slot) or Counts()

    def counts(self) -> Counts | None:
        """Of the whole service since its start; None where nobody counts."""
        now = [self.steering.counts(place.slot) for place in self._places]
        if self.steering.unsteered() is None:
            return None
        return sum((count for count in now if count is not None), self.retired)

    # Who is chosen.

    def watch(self, loop: AbstractEventLoop) -> None:
        """From here on there is a loop to flip in."""
        self._loop = loop
        if self.steering.unsettled() is not None:
            self._has_flipped()  # when there was no loop
        if self._keep_due:
            loop.call_soon(self.keep_if_due)

    def flip_soon(self) -> None:
        """Together with what else happens in the same turn of the loop."""
        assert self._loop
        if self._flip_due is None:
            self._flip_due = self._loop.call_soon(self._flip_in_its_turn)

    def _flip_in_its_turn(self) -> None:
        """Where programs may still read what it would write over it has to wait for them, and so
        comes after that; who gets ready or ends meanwhile is part of it."""
        if self._waiting is None:
            self._try_to_flip()

    def _try_to_flip(self) -> None:
        self._retry.attempt("choose among the workers", self.flip)
        self._tell_flipped()

    def flip(self) -> None:
        """Have those who serve chosen, and nobody else. If that fails it is tried again."""
        assert self._loop
        if self._flip_due is not None:
            self._flip_due.cancel()
        self._flip_due = self._loop.call_later(AGAIN_S, self._flip_in_its_turn)
        members = [place.member() for place in self._places if place.serves]
        if self._ended:
            members = [each for each in members if each.slot not in self._ended]
        with self.naming_locked():
            self.steering.steer(members)
        if forget := self.steering.forget_flows:
            for slot in self._let_go:
                forget(slot)
        self._let_go.clear()
        self._watch_reserve(bool(members))
        self._keep_order()
        self._flip_due.cancel()
        self._flip_due = None
        self._has_flipped()

    def settle(self) -> None:
        """Have who is said to be ready in the table by now. Raises KernelError."""
        if self._flip_due is not None:
            self.flip()

    async def flipped(self) -> None:
        """Until who is said to be ready is in the table, or that was tried."""
        if self._flip_due is not None:
            assert self._loop
            self._told_flipped.append(self._loop.create_future())
            await self._told_flipped[-1]

    def _tell_flipped(self) -> None:
        told, self._told_flipped = self._told_flipped, []
        for each in told:
            _set(each)

    def _has_flipped(self) -> None:
        """What programs that run now choose they may choose as before: they are waited for beside
        the loop, as that takes some 20 ms, and so nobody has to who flips next."""
        self._flips += 1
        self._tell_flipped()
        if self.steering.unsettled() is None and self._waiting is None:
            self._has_settled(self._flips)
        elif self._waiting is None:
            assert self._loop
            self._waiting = self._loop.create_task(self._settle_beside())

    async def _settle_beside(self) -> None:
        try:
            while self._settled < self._flips and not self._released:
                flips, steering, flip = self._flips, self.steering, self.steering.unsettled()
                await _programs_end()
                if flip is not None:
                    steering.settled(flip)
                self._has_settled(flips)
                if self._flip_due is not None and flips == self._flips and not self._released:
                    self._try_to_flip()
        finally:
            self._waiting = None

    def _has_settled(self, flip: int) -> None:
        self._settled = flip
        waiting, self._awaiting = self._awaiting, []
        for each in waiting:
            self.when_settled(*each)

    def flip_now_due(self) -> int:
        """For `has_settled`: the flip after which nobody is chosen who does not serve now."""
        return self._flips + (self._flip_due is not None)

    def has_settled(self, flip: int) -> bool:
        """Whether all that was chosen before this flip is in its queue."""
        return self._released or flip <= self._settled

    def when_settled(self, act: str, do: Callable[[], object], flip: int | None = None) -> None:
        """Do it once all that was chosen before who serves now is in its queue.

        Args:
            flip: before this one instead.
        """
        flip = self.flip_now_due() if flip is None else flip
        if self.has_settled(flip):
            self._retry.attempt(act, do)
        else:
            self._awaiting.append((act, do, flip))

    async def settled(self) -> None:
        """Until all that was chosen before who serves now is in its queue."""
        assert self._loop
        done = self._loop.create_future()
        self.when_settled("wait for programs", partial(_set, done))
        await done

    def end(self, slots: Iterable[int]) -> None:
        """The workers there have ended. Where flows are remembered nobody is chosen there from
        here on: or those that come before the next flip would be remembered there, and move once
        more when the slot is given up. To be called before `left`."""
        if self.steering.forget_flows:
            self._ended.update(slots)
            self._retry.attempt("choose among the workers", self.flip)

    def let_go(self, slot: int) -> None:
        """See `Backend.forget_flows`. With the next flip, or what comes before it would be
        remembered there once more."""
        self._let_go.add(slot)
        self.flip_soon()

    def release(self) -> None:
        """The service ends: hold no socket open, and have nobody adopt what steers."""
        self._released = True
        self._tell_flipped()
        self._has_settled(self._flips)
        self._watch_reserve(False)
        self._guard.drop(STEERING)
        self.steering.release()

    def _watch_reserve(self, somebody: bool) -> None:
        """What gets into the reserve late, as its handshake began when nobody was there, is
        moved on at once; while still nobody is, it waits."""
        assert self._loop
        for sock in self._backup_sockets:
            if somebody:
                self._loop.add_reader(sock, self._empty_reserve)
            else:
                self._loop.remove_reader(sock)

    @property
    def _backup_sockets(self) -> Sequence[socket.socket]:
        return self.steering.backup.sockets if self.steering.backup else ()

    def _empty_reserve(self) -> None:
        """What came back waits a moment: a worker that was told to end by others has closed its
        listeners, and is in the table until it has finished what it has.

        Or the group has another program than ours, or none, as a worker may have done that: by
        ours what waits is moved, by any other it would be reset.
        """
        self._retry.attempt("attach the policy's program again", self.attach_again)
        # By then nothing is on its way there: while it is emptied it does not listen.
        self._watch_reserve(False)
        self.when_settled("move what waits in reserve", self._empty_settled_reserve)

    def _empty_settled_reserve(self) -> None:
        if self._released:
            return
        backup = self.steering.backup
        moved = not backup or self._retry.attempt("move what waits in reserve", backup.empty)
        if not moved or any(map(listeners.is_waited_for, self._backup_sockets)):
            assert self._loop
            self._loop.call_later(_AGAIN_S, self._watch_reserve_again)
        else:
            self._watch_reserve_again()

    def _watch_reserve_again(self) -> None:
        if not self._released:
            self._watch_reserve(any(place.serves for place in self._places))

    def renew_reserve(self, service: Service) -> None:
        """See `Backend.renew_reserve`. Raises BindError, KernelError."""
        self._watch_reserve(False)
        try:
            self.steering.renew_anchors(service)
            if self.steering.backup:
                self.steering.backup.renew(service)
        finally:
            self._watch_reserve(any(place.serves for place in self._places))
            if not self._released:
                self.keep()

    # By what.

    def choose_by(
        self, plan: Plan, members: Sequence[Member], steering: Backend | None = None
    ) -> None:
        """The policy, parameters and weights of this plan from now on. Not kept yet: the
        places come first.

        Args:
            members: those who serve, as the plan has them.
            steering: another backend for it, to which all sockets are new; None: the same.

        Raises:
            KernelError: nothing has changed.
        """
        with self.naming_locked():
            if steering is None:
                self.steering.swap(plan, members, self._lend)
            else:
                self._move_to(steering, members, plan.binds)
        self._watch_reserve(bool(members))
        self._has_flipped()

    def attach_again(self) -> None:
        """What is in force to every group, whatever it has. Raises KernelError."""
        with self.naming_locked():
            self.steering.attach_again(self._lend)

    def _move_to(self, steering: Backend, members: Sequence[Member], binds: Sequence[Bind]) -> None:
        """Have another backend choose; it takes the sockets over with the next flip.

        Raises:
            KernelError: nothing has changed.
        """
        with self._borrow_all() as borrowed, self._lend() as lent:
            if steering.backend != KERNEL:
                reuseport.refuse_locked(lent.values())
            there = self._in_order(borrowed, binds) if steering.needs_order else borrowed
            steering.steer(members)
            self._watch_reserve(False)
            try:
                self.steering.detach(self._lend)
                counted = self.counts()
                _take_over(steering, there, len(binds))
                steering.steer(members)
                _open_backup(steering)
            except SteerError:
                steering.detach(self._lend)
                self.steering.reassert(there)
                _open_backup(self.steering)
                self._watch_reserve(bool(members))
                raise
        self.retired = counted or self.retired
        steering.owns_counting = True
        self.steering.owns_counting = False
        self.steering.close()
        self.steering = steering

    def _in_order(
        self, there: Mapping[int, _Sockets], binds: Sequence[Bind]
    ) -> Mapping[int, _Sockets]:
        """The sockets of every worker in the order in which the kernel has them.

        Raises:
            KernelError: that is not known, or there are others among them.
        """
        act, order = "take over the sockets there are", self.steering.order
        whole = {slot for slot, socks in there.items() if len(socks) == len(binds)}
        if order is None or not whole == set(order) == set(there):
            cause = "classic BPF has to know in which order the kernel has them, and that is known"
            raise KernelError(
                act,
                f"{cause} only as long as no worker has left",
                "stop and start the service",
            )
        ours = frozenset[int]().union(*(one.process.inodes for one in self._places if one.process))
        for bind in binds:
            try:
                reuseport.refuse_strangers(bind, ours)
            except BindError as error:
                raise KernelError(act, error.cause, error.cure) from None
        return {slot: there[slot] for slot in order}

    @contextmanager
    def _borrow_all(self) -> Iterator[Mapping[int, _Sockets]]:
        """The sockets of every worker by slot, for a moment. Raises KernelError."""
        with ExitStack() as lent:
            yield {
                place.slot: lent.enter_context(place.process.sockets())
                for place in self._places
                if place.process
            }

    @contextmanager
    def naming_locked(self) -> Iterator[None]:
        """What `sockets.Locked` is raised in names the workers whose sockets are."""
        try:
            yield
        except reuseport.Locked as error:
            raise reuseport.locked(error.what, self._locked_slots()) from None

    def _locked_slots(self) -> Sequence[int]:
        """Of the groups that no program can be attached to through any member; none where that
        cannot be told."""
        try:
            with self._borrow_all() as there:
                at = {index for socks in there.values() for index in socks}
                groups = [
                    {slot: socks[index] for slot, socks in there.items() if index in socks}
                    for index in at
                ]
                locked = [group for group in groups if all(map(_is_locked, group.values()))]
                return sorted({slot for group in locked for slot in group})
        except KernelError:
            return ()

    @contextmanager
    def _lend(self) -> Iterator[_Sockets]:
        """The sockets of one that serves, else of any; none where nobody is. Those through
        which no program can be attached (`sockets.Locked`, or out of their group) only where
        there is no other.

        Raises:
            KernelError: we may not.
        """
        by_use = sorted(self._places, key=lambda place: (bool(place.left), not place.serves))
        found: _Sockets = {}
        locked: _Sockets = {}
        with ExitStack() as lent:
            for worker in [place.process for place in by_use if place.process]:
                if len(found) < len(worker.bound):
                    theirs = lent.enter_context(worker.sockets())
                    free = {at: each for at, each in theirs.items() if not _is_locked(each)}
                    found, locked = {**free, **found}, {**theirs, **locked}
            yield {**locked, **found}


def _open_backup(steering: Backend) -> None:
    """Raises BindError, KernelError."""
    if steering.backup:
        steering.backup.open()


def _is_locked(sock: socket.socket) -> bool:
    return reuseport.is_locked(sock.fileno())


def _take_over(steering: Backend, there: Mapping[int, _Sockets], binds: int) -> None:
    """Have it take in copies of the sockets of all who still have theirs. Raises KernelError."""
    for slot, socks in there.items():
        if len(socks) == binds:
            steering.taken_over(slot, [os.dup(socks[bind].fileno()) for bind in range(binds)])


def _set(done: Future[None]) -> None:
    """Unless nobody waits for it any more."""
    if not done.done():
        done.set_result(None)


async def _programs_end() -> None:
    """Until all that run now have."""
    from steer.linux.background import in_background  # there by now; it needs asyncio

    try:
        await in_background(shared_memory.wait_for_programs)
    except RuntimeError:  # no more threads
        shared_memory.wait_for_programs()
