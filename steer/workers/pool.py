"""The workers of a service.

The pool holds the workers and offers what the controller may do with them. Other modules do the
work: the pool makes the parts that need no event loop, `supervision` those that do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from steer.backends.base import Backend
from steer.child.launch import Launch
from steer.config.address import Bind
from steer.config.plan import Generation, Plan, WorkerSpec
from steer.config.service import Service
from steer.control.notify import IgnoredReady
from steer.guard.client import GuardClient
from steer.guard.entry import Entry
from steer.linux import signals
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.workers import notifications
from steer.workers.adoption import Adoption, staying
from steer.workers.clock import Clock
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.intake import Batch
from steer.workers.lifecycle import Event
from steer.workers.looks import Looks
from steer.workers.migration import QueueMigration
from steer.workers.policy_switch import PolicySwitch
from steer.workers.queues import Queues
from steer.workers.remains import Remains
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.spawner import Spawner
from steer.workers.start_queue import StartQueue
from steer.workers.visibility import Visibility

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from steer.workers.startup import Startup
    from steer.workers.supervision import Supervision
    from steer.workers.termination import StartDrain


QUICK_S = 1.0
"""The time between SIGTERM and SIGKILL in a quick stop."""

_FIRST_AT_MOST = 16
"""The most workers to start before there is an event loop, if there are as many CPUs."""


class WorkerPool:
    """All workers of one service.

    Call `start` or `adopt` first, then `watch` in a running loop: the first workers start while
    asyncio is being imported.

    Args:
        slots: the capacity; each worker's slot is below it.
        launch: returns the instructions for a worker.
        ignored_ready: reports each READY=1 that no worker sent.

    Attributes:
        generation: the one in force. Workers of earlier ones are retiring.
        activated: the number of the last change whose workers may be selected.
        is_watched: whether `watch` was called.
        clock: measures the time that workers are given.
        looks: the periodic looks at workers.
        batch: how many workers to start in one turn of the loop.
        start_queue: the workers that were never started.
        spawner: forks the processes of workers.
        selection: which workers are selected, and by which backend.
        entries: what the guard stores of workers.
        queues: reads the accept queues of workers.
        migration: migrates the queues of workers that are not selected.
        remains: waits for what workers still have when they have left the table.
        visibility: what cannot be seen of workers, and why.
        group_notes: notes on sockets that left their groups, see `health.groups`.
        shutdown: the end of the service.
    """

    def __init__(
        self,
        generation: Generation,
        slots: int,
        backend: Backend,
        guard: GuardClient,
        launch: Callable[[WorkerHandle], Launch],
        log: Log,
        retry: Retry,
        ignored_ready: IgnoredReady,
    ) -> None:
        self.generation, self.activated = generation, 0
        self.workers = WorkerHandles()
        self.selection = Selection(backend, self.workers, slots, guard, log, retry)
        self.shutdown = Shutdown(self.workers, self.selection, guard, retry)
        self.log, self.retry = log, retry
        self.clock = Clock()
        self.looks = Looks(self.clock, retry)
        self.batch = Batch()
        self.queues = Queues()
        self.visibility = Visibility(log)
        self.migration = QueueMigration(self.selection, self.queues, self.visibility, self.shutdown)
        self.remains = Remains(self.selection, self.queues, self.migration, self.clock, retry)
        self.group_notes: dict[str, str] = {}
        self.is_watched = False
        self.entries = GuardEntries(guard, self.selection, retry)
        self.start_queue = StartQueue(self.workers)
        self.spawner = Spawner(self.workers, self.selection, guard, self.entries, launch)
        self._guard, self.ignored_ready = guard, ignored_ready
        self._supervision: Supervision

    def start(self, holds_ports: Callable[[], None]) -> None:
        """Start the first workers of the generation; `QueuedStarts` starts the others.

        Args:
            holds_ports: called when a worker has bound all addresses, or the queue is paused.

        Raises:
            BindError: an address cannot be bound.
            KernelError: the kernel refuses processes, or sockets in the group.
            SystemExit: a signal asked the controller to exit.
        """
        self.start_queue.is_of_new_service = True
        self.start_queue.limit(self.generation.plan.at_once)
        for spec in self.generation.plan.all_specs:
            self.start_queue.add(self._take(self.generation, spec))
        signals.pause(0)
        cpus = len(os.sched_getaffinity(0))
        first = self.start_queue.next(max(self.batch.size, min(cpus, _FIRST_AT_MOST)))
        if first:
            self.spawner.spawn(first)
        self.start_queue.began(first)
        holds_ports()

    def adopt(
        self,
        generations: Mapping[int, Generation],
        activated: int,
        entries: Mapping[str, Entry],
        selection: Entry,
    ) -> None:
        """Take over the workers of the previous controller; see `Adoption.adopt`."""
        self.activated = activated
        adoption = Adoption(self.workers, self.selection, self.spawner, self.entries, self.clock)
        adoption.adopt(entries.values(), selection, generations, activated)

    def watch(
        self,
        loop: AbstractEventLoop,
        changed: Callable[[WorkerHandle], None],
        start_drain: StartDrain | None = None,
    ) -> None:
        """Supervise the workers from here on.

        Args:
            changed: called with each worker whose state has changed.
            start_drain: see `Supervision`.
        """
        from steer.workers.supervision import Supervision  # already imported by controller.loop

        self._supervision = Supervision(self, loop, changed, start_drain)
        self.is_watched = True
        self.clock.run(loop, self.looks.take)
        self._supervision.begin()

    def fill(self) -> None:
        """Start a worker for each spec of the generation that has none, and retire the workers of
        other generations and of changes that were not completed. Spares take the places of those
        that are missing."""
        stay = staying(self.workers, self.generation)
        for worker in list(self.workers):
            if stay.get(worker.spec.number) is not worker:
                self.report(worker, Event.RETIRE)
        for spec in self.generation.plan.all_specs:
            if spec.number not in stay:
                self.start_queue.add(missing := self._take(self.generation, spec))
                self._supervision.spares.replace(missing)
        self._supervision.queued_starts.begin()

    def resume_starts(self) -> None:
        """Start the workers of the start queue, which was paused."""
        self.start_queue.is_paused = False
        self._supervision.queued_starts.begin()

    def abandon(self) -> None:
        """Kill all processes of workers, whatever state they are in."""
        self.spawner.kill_all()
        self.shutdown.kill_leftovers()

    @property
    def backend(self) -> Backend:
        """The backend in force."""
        return self.selection.backend

    @property
    def service(self) -> Service:
        """The configuration in force."""
        return self.generation.plan.service

    @property
    def binds(self) -> Sequence[Bind]:
        """The binds of the service."""
        return self.generation.plan.binds

    def graceful_timeout_s(self) -> float:
        """How long a worker may take to finish, as configured now."""
        return self.service.graceful_timeout

    @property
    def startup(self) -> Startup:
        """Whether the service has come up. It exists once `watch` was called."""
        return self._supervision.startup

    @property
    def own_pids(self) -> set[int | None]:
        """This controller and its guard, which may have sockets of workers open."""
        return {os.getpid(), self._guard.pid}

    def start_held(
        self,
        specs: Iterable[WorkerSpec],
        generation: Generation,
        niced: bool,
        on_outcome: Callable[[WorkerHandle], None],
    ) -> Sequence[WorkerHandle]:
        """Start workers that are not selected until `activate`; see `Replacement.start`.

        Args:
            niced, on_outcome: see `WorkerHandle`.
        """
        change = self.activated + 1
        take = partial(
            self._take, generation, held=True, change=change, niced=niced, on_outcome=on_outcome
        )
        return self._supervision.replacement.start(map(take, specs))

    def give_spec(self, worker: WorkerHandle, spec: WorkerSpec) -> None:
        """See `Spares.give_spec`."""
        self._supervision.spares.give_spec(worker, spec)

    def activate(self, workers: Iterable[WorkerHandle]) -> None:
        """See `Replacement.activate`. The guard then stores the number of the change, and no entry
        of a worker has to be written."""
        self._supervision.replacement.activate(workers)
        self.activated += 1

    def retire(self, workers: Iterable[WorkerHandle]) -> None:
        """See `Replacement.retire`."""
        self._supervision.replacement.retire(workers)

    def stop(self, within_s: float, quick: bool) -> None:
        """Tell every worker to finish, and kill those that have not finished in time.

        Args:
            quick: open requests need not be finished.
        """
        self.shutdown.begin(within_s, quick)
        self.startup.succeed()
        self._supervision.stopping.begin(self.workers)

    def reaped(self, pids: Iterable[int]) -> None:
        """Processes that we inherited as children have ended."""
        self._supervision.ends.reaped(pids)

    def serve_early(self, pid: int) -> bool:
        """See `notifications.serve_early`."""
        return notifications.serve_early(pid, self.workers, self.selection)

    def notified(self, lineage: Sequence[int], message: Mapping[str, str]) -> None:
        """See `Notifications.take`."""
        self._supervision.notifications.take(lineage, message)

    def report(self, worker: WorkerHandle, event: Event) -> None:
        """See `Transitions.report`."""
        self._supervision.transitions.report(worker, event)

    def switch_policy(self, plan: Plan, backend: Backend | None = None) -> None:
        """See `PolicySwitch.switch`."""
        switch = PolicySwitch(self.workers, self.selection, self.entries)
        self.generation, unpinned = switch.switch(self.generation, plan, backend)
        # In steps, as selection does not depend on where workers run.
        self._supervision.pinning.begin(unpinned)

    def pin(self) -> None:
        """Pin each worker to the CPUs of its spec: cgroup v1 undoes that when a cpuset grows."""
        self._supervision.pinning.begin(self.workers)

    def _take(self, generation: Generation, spec: WorkerSpec, **keys: Any) -> WorkerHandle:
        """A new worker without a process. Raises ControlError: there are too many."""
        worker = WorkerHandle(spec, self.selection.take_slot(), generation, **keys)
        self.workers.add(worker)
        if self.is_watched:
            self.startup.add(worker)
        return worker

    def save(self) -> None:
        """Have the guard store now what it would get after this turn of the loop."""
        self.entries.flush()
        self.selection.save_if_due()
