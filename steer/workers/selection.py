"""Who may be selected: the slots of a service, those of them that serve now, and by which backend.

All that changes in one turn of the loop is one publication.
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

    Slots can be taken and joined at once; publishing takes a loop, see `watch`.

    Args:
        workers: all that have a slot, at any time: others add to them and remove.
        slots: capacity; a slot is below it.
        guard: has all that another controller needs.

    Attributes:
        backend: the backend in force.
        retired: what was counted for slots since given up.
    """

    def __init__(
        self,
        backend: Backend,
        workers: Collection[WorkerHandle],
        slots: int,
        guard: GuardClient,
        log: Log,
        retry: Retry,
    ) -> None:
        self.backend = backend
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
        return self.backend

    def _some_serve(self) -> bool:
        return any(worker.serves for worker in self._workers)

    def watch(self, loop: AbstractEventLoop) -> None:
        """From here on there is a loop to publish in."""
        self._backup.watch(loop)
        self._publisher.watch(loop)
        self._stored.watch(loop)

    def release(self) -> None:
        """The service ends: hold no socket open, and have nobody adopt what steers."""
        self._backup.release()
        self._stored.release()
        self._publisher.release()
        self.backend.release()

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
        self.backend.restore(saved.value, fds, held)
        # One may have been on its way out, and its slot not yet given up.
        for slot in self._slots.free:
            self._put_aside(slot)
        try:
            with self._sockets.all() as there:
                self.backend.reassert(there)
        except KernelError as error:
            self._log.warning("not seen whether the kernel steers as it should: %s", error)

    # Slots.

    def take_slot(self) -> int:
        """See `Slots.take`. Raises ControlError."""
        return self._slots.take()

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """A new worker's sockets; see `Backend.add_member`. Raises KernelError."""
        with self.naming_locked():
            self.backend.add_member(slot, fds)
        self._stored.order_changed()

    def left(self, slot: int) -> None:
        """The worker there has ended."""
        with self.naming_locked():
            self.backend.remove_member(slot)
        self._stored.order_changed()

    def give_up(self, slot: int) -> None:
        """It is nobody's any more; what was counted for it is put aside."""
        self._put_aside(slot)
        self._slots.give_up(slot)
        self._ended.discard(slot)
        self._stored.renew_soon()

    def _put_aside(self, slot: int) -> None:
        self.retired += self.backend.take_counts(slot) or Counts()

    def counts(self) -> Counts | None:
        """Of the whole service since its start; None where nobody counts."""
        now = [self.backend.counts(worker.slot) for worker in self._workers]
        if self.backend.unsteered() is None:
            return None
        return sum((count for count in now if count is not None), self.retired)

    # Who is selected: see `Publisher`.

    def _publish(self) -> None:
        """Have those who serve selected, and nobody else."""
        members = [worker.member() for worker in self._workers if worker.serves]
        if self._ended:
            members = [each for each in members if each.slot not in self._ended]
        with self.naming_locked():
            self.backend.steer(members)
        if forget := self.backend.forget_flows:
            for slot in self._let_go:
                forget(slot)
        self._let_go.clear()
        self._backup.follow(bool(members))
        self._stored.order_changed()

    def publish_soon(self) -> None:
        """Together with what else happens in the same turn of the loop."""
        self._publisher.soon()

    def publish(self) -> None:
        """Have those who serve selected, and nobody else. If that fails it is tried again."""
        self._publisher.now()

    def publish_if_due(self) -> None:
        """Have who is said to be ready in the table by now. Raises KernelError."""
        self._publisher.if_due()

    async def published(self) -> None:
        """Until who is said to be ready is in the table, or that was tried."""
        await self._publisher.published()

    def next_publication(self) -> int:
        """For `is_synchronized`: after this publication nobody is selected who does not serve
        now."""
        return self._publisher.next_publication()

    def is_synchronized(self, publication: int) -> bool:
        """Whether all that was selected before this publication is in its queue."""
        return self._publisher.is_synchronized(publication)

    def when_synchronized(
        self, act: str, do: Callable[[], object], publication: int | None = None
    ) -> None:
        """Do it once all that was selected before who serves now is in its queue.

        Args:
            publication: before this one instead.
        """
        self._publisher.when_synchronized(act, do, publication)

    async def synchronized(self) -> None:
        """Until all that was selected before who serves now is in its queue."""
        await self._publisher.synchronized()

    def end(self, slots: Iterable[int]) -> None:
        """The workers there have ended. Where flows are remembered nobody is selected there from
        here on: or those that come before the next publication would be remembered there, and
        move once more when the slot is given up. To be called before `left`."""
        if self.backend.forget_flows:
            self._ended.update(slots)
            self._publisher.attempt()

    def let_go(self, slot: int) -> None:
        """See `Backend.forget_flows`. With the next publication, or what comes before it would be
        remembered there once more."""
        self._let_go.add(slot)
        self.publish_soon()

    # By what.

    def choose_by(
        self, plan: Plan, members: Sequence[Member], backend: Backend | None = None
    ) -> None:
        """The policy, parameters and weights of this plan from now on. Not kept yet: the
        places come first.

        Args:
            members: those who serve, as the plan has them.
            backend: another backend for it, to which all sockets are new; None: the same.

        Raises:
            KernelError: nothing has changed.
        """
        with self.naming_locked():
            if backend is None:
                self.backend.swap(plan, members, self._sockets.usable)
            else:
                self._move_to(backend, members, plan.binds)
        self._backup.follow(bool(members))
        self._publisher.has_published()

    def _move_to(self, fresh: Backend, members: Sequence[Member], binds: Sequence[Bind]) -> None:
        """Raises KernelError: nothing has changed."""
        before = self.backend
        self._backup.pause()
        try:
            counted = hand_over(before, fresh, members, binds, self._sockets, self.counts)
        except SteerError:
            self._backup.follow(bool(members))
            raise
        self.retired = counted or self.retired
        before.close()
        self.backend = fresh

    def attach_again(self) -> None:
        """What is in force to every group, whatever it has. Raises KernelError."""
        with self.naming_locked():
            self.backend.reattach(self._sockets.usable)

    def naming_locked(self) -> AbstractContextManager[None]:
        """See `WorkerSockets.naming_locked`."""
        return self._sockets.naming_locked()

    def renew_controller_sockets(self, service: Service) -> None:
        """Have our own sockets be as another configuration needs them.

        Raises:
            BindError, KernelError: they are not, or not all of them.
        """
        self._backup.pause()
        try:
            self.backend.renew_anchors(service)
            if self.backend.backup:
                self.backend.backup.renew(service)
        finally:
            self._backup.go_on()
            self._stored.renew_unless_released()
