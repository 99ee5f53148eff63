"""Which workers are selected, in which slots, and by which backend."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
from steer.workers.stored_selection import SelectionEntry, StoredSelection
from steer.workers.worker_sockets import WorkerSockets

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class Selection:
    """The slots of a service, and the backend that selects among the workers in them.

    Slots can be taken at once. Publishing needs an event loop, see `watch`.

    Args:
        workers: all workers of the pool, which others add and remove.
        slots: the capacity; each slot is below it.
        guard: stores what the next controller needs.

    Attributes:
        backend: the backend in force.
        retired: what was counted for slots that were released since.
        publisher: publishes which workers are selected.
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
        self._flows_to_forget: set[int] = set()
        self._log = log
        self._sockets = WorkerSockets(workers)
        self._entry = SelectionEntry(
            self._backend, lambda: (self.retired, self._slots.next), guard, retry
        )
        self.publisher = Publisher(self._publish, self._backend, retry)
        self._backup = BackupWatch(
            self._backend, self._some_serve, self.attach_again, self.publisher, retry
        )

    def _backend(self) -> Backend:
        return self.backend

    def _some_serve(self) -> bool:
        return any(worker.serves for worker in self._workers)

    def watch(self, loop: AbstractEventLoop) -> None:
        """Use this event loop from here on."""
        self._backup.watch(loop)
        self.publisher.watch(loop)
        self._entry.watch(loop)

    def release(self) -> None:
        """The service stops: close the controller's sockets, and leave nothing to adopt."""
        self._backup.release()
        self._entry.release()
        self.publisher.release()
        self.backend.release()

    # What the guard stores, see `SelectionEntry`.

    def save(self) -> None:
        """Have the guard store the selection as it is now."""
        self._entry.save()

    def save_if_due(self) -> None:
        """Save now what the next turn of the loop would save."""
        self._entry.save_if_due()

    def together(self) -> AbstractContextManager[Mapping[int, int]]:
        """See `SelectionEntry.together`."""
        return self._entry.together()

    def restore(
        self, stored: StoredSelection, fds: Sequence[int], held: Mapping[int, Sequence[int]]
    ) -> None:
        """Continue with the selection of the previous controller.

        Args:
            fds: the descriptors that were stored with it. The selection closes them.
            held: by slot that is taken, the descriptors that the controller held of the worker.
        """
        self.retired = stored.retired
        self._slots.restore(held, stored.next_slot)
        self.backend.restore(stored.value, fds, held)
        # A worker may have ended whose slot was not released yet.
        for slot in self._slots.free:
            self._retire_counts(slot)
        try:
            with self._sockets.all() as sockets:
                self.backend.reassert(sockets)
        except KernelError as error:
            self._log.warning(
                "cannot check that the kernel has the programs and sockets: %s", error
            )

    # Slots.

    def take_slot(self) -> int:
        """See `Slots.take`. Raises ControlError."""
        return self._slots.take()

    def add_sockets(self, slot: int, fds: Sequence[int]) -> None:
        """Add the sockets of a new worker; see `Backend.add_member`. Raises KernelError."""
        with self.naming_locked():
            self.backend.add_member(slot, fds)
        self._entry.order_changed()

    def remove_sockets(self, slot: int) -> None:
        """Remove the sockets of a worker that has ended."""
        with self.naming_locked():
            self.backend.remove_member(slot)
        self._entry.order_changed()

    def release_slot(self, slot: int) -> None:
        """The slot is free again. What was counted for it is added to `retired`."""
        self._retire_counts(slot)
        self._slots.release(slot)
        self._ended.discard(slot)
        self._entry.save_soon()

    def _retire_counts(self, slot: int) -> None:
        self.retired += self.backend.take_counts(slot) or Counts()

    def counts(self) -> Counts | None:
        """The counts of the whole service since its start; None if the backend does not count."""
        now = [self.backend.counts(worker.slot) for worker in self._workers]
        if self.backend.unsteered() is None:
            return None
        return sum((count for count in now if count is not None), self.retired)

    # Which workers are selected.

    def _publish(self) -> None:
        """Select the workers that serve, and no others."""
        members = [worker.member() for worker in self._workers if worker.serves]
        if self._ended:
            members = [each for each in members if each.slot not in self._ended]
        with self.naming_locked():
            self.backend.steer(members)
        if forget := self.backend.forget_flows:
            for slot in self._flows_to_forget:
                forget(slot)
        self._flows_to_forget.clear()
        self._backup.follow(bool(members))
        self._entry.order_changed()

    def exclude_ended(self, slots: Iterable[int]) -> None:
        """The workers in these slots have ended. If the policy remembers flows, publish at once
        that they are not selected: flows that come before that would be remembered there, and
        move again when the slot is released. Call this before `remove_sockets`."""
        if self.backend.forget_flows:
            self._ended.update(slots)
            self.publisher.attempt()

    def publish_soon_or_now(self) -> None:
        """Publish after this turn of the loop. If the policy remembers flows, do it now, see
        `exclude_ended`."""
        if self.backend.forget_flows:
            self.publisher.attempt()
        else:
            self.publisher.soon()

    def forget_flows_soon(self, slot: int) -> None:
        """Forget the flows of this slot, see `Backend.forget_flows`, with the next publication:
        flows that come before it would be remembered there again."""
        self._flows_to_forget.add(slot)
        self.publisher.soon()

    # The policy and the backend.

    def switch_policy(
        self, plan: Plan, members: Sequence[Member], backend: Backend | None = None
    ) -> None:
        """Use the policy, parameters and weights of this plan from now on. The caller saves that,
        after the workers.

        Args:
            members: the workers that serve, with the specs of the plan.
            backend: another backend, which takes over all sockets; None: the present one.

        Raises:
            KernelError: it failed, and nothing has changed.
        """
        with self.naming_locked():
            if backend is None:
                self.backend.swap(plan, members, self._sockets.usable)
            else:
                self._move_to(backend, members, plan.binds)
        self._backup.follow(bool(members))
        self.publisher.has_published()

    def _move_to(self, fresh: Backend, members: Sequence[Member], binds: Sequence[Bind]) -> None:
        """Raises KernelError: it failed, and nothing has changed."""
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
        """Attach the program in force to every group, whatever is attached. Raises KernelError."""
        with self.naming_locked():
            self.backend.reattach(self._sockets.usable)

    def naming_locked(self) -> AbstractContextManager[None]:
        """See `WorkerSockets.naming_locked`."""
        return self._sockets.naming_locked()

    def renew_controller_sockets(self, service: Service) -> None:
        """Replace backup listeners and anchors by those that another configuration needs. Where
        that fails they stay as they are, and it is logged."""
        self._backup.pause()
        try:
            self.backend.renew_anchors(service)
            if self.backend.backup:
                self.backend.backup.renew(service)
        except SteerError as error:
            self._log.error("the backup listeners keep their former options: %s", error)
        finally:
            self._backup.go_on()
            self._entry.save_unless_released()
