"""The workers of a service.

The pool holds them and names what may be asked of them; the parts that do it are beside it, and
`supervision` puts together those that need an event loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from steer.backends.base import Backend
from steer.child.launch import Launch
from steer.config.plan import Generation, Plan, WorkerSpec
from steer.config.service import Service
from steer.control.notify import Unheard
from steer.errors import SteerError
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
from steer.workers.intake import Lot
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

    from steer.workers.commands import StartDrain
    from steer.workers.startup import Startup
    from steer.workers.supervision import Supervision


QUICK_S = 1.0
"""How long a quick stop waits between SIGTERM and SIGKILL."""

_FIRST_AT_MOST = 16
"""Before there is a loop, where there are CPUs for so many."""


class WorkerPool:
    """All workers of one service, and whoever else has to do with them.

    First `start` or `adopt`, then `watch` in a running loop: asyncio is imported while the
    first workers already start.

    Args:
        slots: capacity; a worker's slot is below it.
        launch: makes a worker's instructions.
        unheard: told of a READY=1 that no worker sent.

    Attributes:
        generation: the one in force; a worker may be of an earlier one, and on its way out.
        activated: the number of the last change whose workers may be selected.
        by_pid: workers with a process, by the process id of its first.
        is_watched: whether there is a loop to look after them in.
        clock: measures the time that workers are given.
        looks: what is looked at again and again.
        lot: how many start in one turn of the loop.
        selection: which workers are selected, and by which backend.
        entries: what the guard knows of workers.
        queues: what waits at workers.
        migration: moves what waits at workers that are not selected.
        remains: what workers have that are not selected any more.
        visibility: what of workers cannot be seen.
        group_notes: on sockets that left their groups, see `groups`.
        shutdown: whether all workers are told to end, and whether they have.
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
        unheard: Unheard,
    ) -> None:
        self.generation, self.activated = generation, 0
        self.workers = WorkerHandles()
        self.by_pid: dict[int, WorkerHandle] = {}
        self.selection = Selection(backend, self.workers, slots, guard, log, retry)
        self.shutdown = Shutdown(self.workers, self.selection, guard, retry)
        self.log, self.retry = log, retry
        self.clock = Clock()
        self.looks = Looks(self.clock, retry)
        self.lot = Lot()
        self.queues = Queues()
        self.visibility = Visibility(log)
        self.migration = QueueMigration(self.selection, self.queues, self.visibility, self.shutdown)
        self.remains = Remains(self.selection, self.queues, self.migration, self.clock, retry)
        self.group_notes: dict[str, str] = {}
        self.is_watched = False
        self.entries = GuardEntries(guard, self.selection, retry)
        self._queue = StartQueue(self.workers)
        self._spawner = Spawner(
            self.workers, self.by_pid, self.selection, guard, self.entries, launch
        )
        self._guard, self._unheard = guard, unheard
        self._supervision: Supervision

    def start(self, holds_ports: Callable[[], None]) -> None:
        """Start the first workers of the generation; `Starter` starts the others.

        Args:
            holds_ports: called when a worker has bound all addresses.

        Raises:
            BindError: an address cannot be had.
            KernelError: the kernel refuses processes, or sockets in the group.
            SystemExit: a signal says to end.
        """
        self._queue.is_of_new_service = True
        self._queue.limit(self.generation.plan.at_once)
        for spec in self.generation.plan.specs:
            self._queue.add(self._take(self.generation, spec))
        signals.pause(0)
        cpus = len(os.sched_getaffinity(0))
        first = self._queue.next(max(self.lot.size, min(cpus, _FIRST_AT_MOST)))
        self._spawner.spawn(first)
        self._queue.began(first)
        holds_ports()

    def adopt(
        self,
        generations: Mapping[int, Generation],
        activated: int,
        entries: Mapping[str, Entry],
        selection: Entry,
    ) -> None:
        """Go on with the workers that another controller left; see `Adoption.adopt`."""
        self.activated = activated
        adoption = Adoption(self.workers, self.selection, self._spawner, self.entries, self.clock)
        adoption.adopt(entries.values(), selection, generations, activated)

    def watch(
        self,
        loop: AbstractEventLoop,
        changed: Callable[[WorkerHandle], None],
        start_drain: StartDrain | None = None,
    ) -> None:
        """Look after the workers from here on.

        Args:
            changed: told of a worker that is in another state.
            start_drain: see `Commands`; if another one than of `Drainer`.
        """
        from steer.workers.supervision import Supervision  # by now, see steer.controller.loop

        self._supervision = Supervision(
            loop,
            changed,
            lambda: self.generation.plan.service.graceful_timeout,
            start_drain,
            workers=self.workers,
            by_pid=self.by_pid,
            selection=self.selection,
            migration=self.migration,
            remains=self.remains,
            entries=self.entries,
            queue=self._queue,
            lot=self.lot,
            spawner=self._spawner,
            shutdown=self.shutdown,
            visibility=self.visibility,
            unheard=self._unheard,
            clock=self.clock,
            log=self.log,
            retry=self.retry,
        )
        self.is_watched = True
        self.clock.run(loop, self.looks.take)
        self._supervision.begin()

    def fill(self) -> None:
        """After `watch`: start a worker on each seat of the generation that nobody has. Retire
        those that are of another generation, or came with a change that was not finished."""
        stay = staying(self.workers, self.generation)
        for worker in list(self.workers):
            if stay.get(worker.spec.number) is not worker:
                self.report(worker, Event.RETIRE)
        for spec in self.generation.plan.specs:
            if spec.number not in stay:
                self._queue.add(self._take(self.generation, spec))
        self._supervision.starter.start_queued()

    def abandon(self) -> None:
        """Leave no process, whatever happened."""
        self._spawner.kill_all()
        self.shutdown.kill_leftovers()

    @property
    def backend(self) -> Backend:
        """The backend in force."""
        return self.selection.backend

    @property
    def startup(self) -> Startup:
        """Whether the service has come up. There is none before `watch`."""
        return self._supervision.startup

    @property
    def own_pids(self) -> set[int | None]:
        """Of this controller and its guard, who may have sockets of workers open."""
        return {os.getpid(), self._guard.pid}

    def start_held(
        self,
        specs: Iterable[WorkerSpec],
        generation: Generation,
        niced: bool,
        on_outcome: Callable[[WorkerHandle], None],
    ) -> Sequence[WorkerHandle]:
        """Start workers that are held until `activate`; see `Replacement.start`.

        Args:
            niced, on_outcome: see `WorkerHandle`.
        """
        change = self.activated + 1
        take = partial(
            self._take, generation, held=True, change=change, niced=niced, on_outcome=on_outcome
        )
        return self._supervision.replacement.start(map(take, specs))

    def activate(self, workers: Iterable[WorkerHandle]) -> None:
        """See `Replacement.activate`. The guard is then told the number of the change, and need
        not be told of each worker."""
        self._supervision.replacement.activate(workers)
        self.activated += 1

    def retire(self, workers: Iterable[WorkerHandle]) -> None:
        """See `Replacement.retire`."""
        self._supervision.replacement.retire(workers)

    def stop(self, within_s: float, quick: bool) -> None:
        """Tell every worker to finish; those that have not by then are killed.

        Args:
            quick: they need not finish what they have.
        """
        self.shutdown.begin(within_s, quick)
        self.startup.succeed()
        self._supervision.stopping.begin(self.workers)

    def reaped(self, pids: Iterable[int]) -> None:
        """Children of ours have ended that somebody had left behind."""
        self._supervision.ends.reaped(pids)

    def serve_early(self, pid: int) -> bool:
        """See `notifications.serve_early`."""
        return notifications.serve_early(pid, self.by_pid, self.selection)

    def notified(self, lineage: Sequence[int], message: Mapping[str, str]) -> None:
        """See `Notifications.take`."""
        self._supervision.notifications.take(lineage, message)

    def report(self, worker: WorkerHandle, event: Event) -> None:
        """See `Transitions.report`."""
        self._supervision.transitions.report(worker, event)

    def renew_controller_sockets(self, service: Service) -> None:
        """Have the backup listeners listen with the options that workers have from now on."""
        try:
            self.selection.renew_controller_sockets(service)
        except SteerError as error:
            self.log.error("the backup listeners keep their former options: %s", error)

    def choose_by(self, plan: Plan, backend: Backend | None = None) -> None:
        """See `PolicySwitch.switch`."""
        switch = PolicySwitch(self.workers, self.selection, self.entries)
        self.generation, unpinned = switch.switch(self.generation, plan, backend)
        # Nobody waits for it: wherever workers run, they get what the table says.
        self._supervision.pinning.begin(unpinned)

    def pin(self) -> None:
        """Each worker to the CPUs of its seat: where a cpuset grows, cgroup v1 takes that back."""
        self._supervision.pinning.begin(self.workers)

    def _take(self, generation: Generation, spec: WorkerSpec, **keys: Any) -> WorkerHandle:
        """A worker for this seat, without a process yet. Raises ControlError: too many."""
        worker = WorkerHandle(spec, self.selection.take_slot(), generation, **keys)
        self.workers.add(worker)
        if self.is_watched:
            self.startup.add(worker)
        return worker

    def save(self) -> None:
        """Tell the guard now what it would be told after this turn of the loop."""
        self.entries.flush()
        self.selection.keep_if_due()
