"""Who may be selected: the slots of a service, those of them that serve now, and by which backend.

All that changes in one turn of the loop is one flip.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from steer.backends.base import Backend, Counts
from steer.config.address import Bind
from steer.config.plan import Plan
from steer.config.service import Service
from steer.errors import KernelError, SteerError
from steer.guard.client import GuardClient
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.policy.layout import Member
from steer.workers.backend_change import hand_over
from steer.workers.backup_watch import BackupWatch
from steer.workers.handle import WorkerHandle
from steer.workers.publisher import Publisher
from steer.workers.slots import Slots
from steer.workers.stored_selection import SavedSelection, StoredSelection
from steer.workers.worker_sockets import WorkerSockets

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class Selection:
    """Which workers are selected, on which backend.

    Slots can be taken and joined at once; to flip it takes a loop, see `watch`.

    Args:
        workers: all that have a slot, at any time: others add to them and remove.
        slots: capacity; a slot is below it.
        guard: has all that another controller needs.

    Attributes:
        steering: the backend in force.
        retired: what was counted for slots since given up.
    """

    def __init__(
        self,
        steering: Backend,
        workers: Collection[WorkerHandle],
        slots: int,
        guard: GuardClient,
        log: Log,
        retry: Retry,
    ) -> None:
        self.steering = steering
        self.retired = Counts()
        self._workers = workers
        self._slots = Slots(slots)
        self._ended: set[int] = set()
        self._let_go: set[int] = set()
        self._log = log
        self._sockets = WorkerSockets(workers)
        self._stored = StoredSelection(
            self._backend, lambda: (self.retired, self._slots.next), guard, retry
        )
        self._publisher = Publisher(self._publish, self._backend, retry)
        self._backup = BackupWatch(
            self._backend, self._some_serve, self.attach_again, self._publisher, retry
        )

    def _backend(self) -> Backend:
        return self.steering

    def _some_serve(self) -> bool:
        return any(worker.serves for worker in self._workers)

    def watch(self, loop: AbstractEventLoop) -> None:
        """From here on there is a loop to flip in."""
        self._backup.watch(loop)
        self._publisher.watch(loop)
        self._stored.watch(loop)

    def release(self) -> None:
        """The service ends: hold no socket open, and have nobody adopt what steers."""
        self._backup.release()
        self._stored.release()
        self._publisher.release()
        self.steering.release()

    # For another controller: see `StoredSelection`.

    def keep(self) -> None:
        """Have the guard know how it is now."""
        self._stored.renew()

    def keep_if_due(self) -> None:
        """Do not wait for the next turn of the loop: there may be none."""
        self._stored.renew_if_due()

    def together(self) -> AbstractContextManager[Mapping[int, int]]:
        """See `StoredSelection.together`."""
        return self._stored.together()

    def restore(
        self, saved: SavedSelection, fds: Sequence[int], held: Mapping[int, Sequence[int]]
    ) -> None:
        """Go on where another controller stopped.

        Args:
            fds: kept with what it saved; they become ours.
            held: by slots that are still taken, the descriptors it held of each.
        """
        self.retired = saved.retired
        self._slots.restore(held, saved.next_slot)
        self.steering.restore(saved.value, fds, held)
        # One may have been on its way out, and its slot not yet given up.
        for slot in self._slots.free:
            self._put_aside(slot)
        try:
            with self._sockets.all() as there:
                self.steering.reassert(there)
        except KernelError as error:
            self._log.warning("not seen whether the kernel steers as it should: %s", error)

    # Slots.

    def take_slot(self) -> int:
        """See `Slots.take`. Raises ControlError."""
        return self._slots.take()

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """A new worker's sockets; see `Backend.joined`. Raises KernelError."""
        with self.naming_locked():
            self.steering.joined(slot, fds)
        self._stored.order_changed()

    def left(self, slot: int) -> None:
        """The worker there has ended."""
        with self.naming_locked():
            self.steering.left(slot)
        self._stored.order_changed()

    def give_up(self, slot: int) -> None:
        """It is nobody's any more; what was counted for it is put aside."""
        self._put_aside(slot)
        self._slots.give_up(slot)
        self._ended.discard(slot)
        self._stored.renew_soon()

    def _put_aside(self, slot: int) -> None:
        self.retired += self.steering.retire(slot) or Counts()

    def counts(self) -> Counts | None:
        """Of the whole service since its start; None where nobody counts."""
        now = [self.steering.counts(worker.slot) for worker in self._workers]
        if self.steering.unsteered() is None:
            return None
        return sum((count for count in now if count is not None), self.retired)

    # Who is selected: see `Publisher`.

    def _publish(self) -> None:
        """Have those who serve selected, and nobody else."""
        members = [worker.member() for worker in self._workers if worker.serves]
        if self._ended:
            members = [each for each in members if each.slot not in self._ended]
        with self.naming_locked():
            self.steering.steer(members)
        if forget := self.steering.forget_flows:
            for slot in self._let_go:
                forget(slot)
        self._let_go.clear()
        self._backup.follow(bool(members))
        self._stored.order_changed()

    def flip_soon(self) -> None:
        """Together with what else happens in the same turn of the loop."""
        self._publisher.soon()

    def flip(self) -> None:
        """Have those who serve selected, and nobody else. If that fails it is tried again."""
        self._publisher.now()

    def settle(self) -> None:
        """Have who is said to be ready in the table by now. Raises KernelError."""
        self._publisher.if_due()

    async def flipped(self) -> None:
        """Until who is said to be ready is in the table, or that was tried."""
        await self._publisher.published()

    def flip_now_due(self) -> int:
        """For `has_settled`: the flip after which nobody is selected who does not serve now."""
        return self._publisher.next_number()

    def has_settled(self, flip: int) -> bool:
        """Whether all that was selected before this flip is in its queue."""
        return self._publisher.has_settled(flip)

    def when_settled(self, act: str, do: Callable[[], object], flip: int | None = None) -> None:
        """Do it once all that was selected before who serves now is in its queue.

        Args:
            flip: before this one instead.
        """
        self._publisher.when_settled(act, do, flip)

    async def settled(self) -> None:
        """Until all that was selected before who serves now is in its queue."""
        await self._publisher.settled()

    def end(self, slots: Iterable[int]) -> None:
        """The workers there have ended. Where flows are remembered nobody is selected there from
        here on: or those that come before the next flip would be remembered there, and move once
        more when the slot is given up. To be called before `left`."""
        if self.steering.forget_flows:
            self._ended.update(slots)
            self._publisher.attempt()

    def let_go(self, slot: int) -> None:
        """See `Backend.forget_flows`. With the next flip, or what comes before it would be
        remembered there once more."""
        self._let_go.add(slot)
        self.flip_soon()

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
                self.steering.swap(plan, members, self._sockets.usable)
            else:
                self._move_to(steering, members, plan.binds)
        self._backup.follow(bool(members))
        self._publisher.has_published()

    def _move_to(self, fresh: Backend, members: Sequence[Member], binds: Sequence[Bind]) -> None:
        """Raises KernelError: nothing has changed."""
        before = self.steering
        self._backup.pause()
        try:
            counted = hand_over(before, fresh, members, binds, self._sockets, self.counts)
        except SteerError:
            self._backup.follow(bool(members))
            raise
        self.retired = counted or self.retired
        before.close()
        self.steering = fresh

    def attach_again(self) -> None:
        """What is in force to every group, whatever it has. Raises KernelError."""
        with self.naming_locked():
            self.steering.attach_again(self._sockets.usable)

    def naming_locked(self) -> AbstractContextManager[None]:
        """See `WorkerSockets.naming_locked`."""
        return self._sockets.naming_locked()

    def renew_own_sockets(self, service: Service) -> None:
        """Have our own sockets be as another configuration needs them.

        Raises:
            BindError, KernelError: they are not, or not all of them.
        """
        self._backup.pause()
        try:
            self.steering.renew_anchors(service)
            if self.steering.backup:
                self.steering.backup.renew(service)
        finally:
            self._backup.go_on()
            self._stored.renew_unless_released()
