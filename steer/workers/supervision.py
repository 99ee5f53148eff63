"""The parts of a pool that need an event loop, put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from steer.workers.commands import Activation, Backoff
from steer.workers.deadlines import Deadlines
from steer.workers.drain import Drainer
from steer.workers.ended import EndedWorkers
from steer.workers.ends import Ends
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Command, Event
from steer.workers.notifications import Notifications
from steer.workers.replacement import Replacement
from steer.workers.socket_removal import SocketRemoval
from steer.workers.spares import Spares
from steer.workers.starter import QueuedStarts, Restarts, Starter
from steer.workers.startup import Startup
from steer.workers.steps import InSteps
from steer.workers.termination import StartDrain, Termination
from steer.workers.transitions import Failures, Transitions
from steer.workers.watcher import Watcher
from steer.workers.worker_log import WorkerLog

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from steer.control.notify import IgnoredReady
    from steer.linux.log import Log
    from steer.linux.retry import Retry
    from steer.workers.clock import Clock
    from steer.workers.guard_entries import GuardEntries
    from steer.workers.handle import WorkerHandles
    from steer.workers.intake import Batch
    from steer.workers.migration import QueueMigration
    from steer.workers.remains import Remains
    from steer.workers.selection import Selection
    from steer.workers.shutdown import Shutdown
    from steer.workers.spawner import Spawner
    from steer.workers.start_queue import StartQueue
    from steer.workers.visibility import Visibility


class LooplessParts(Protocol):
    """The parts of a `WorkerPool` that need no event loop."""

    workers: WorkerHandles
    selection: Selection
    migration: QueueMigration
    remains: Remains
    entries: GuardEntries
    start_queue: StartQueue
    spawner: Spawner
    batch: Batch
    shutdown: Shutdown
    visibility: Visibility
    ignored_ready: IgnoredReady
    clock: Clock
    log: Log
    retry: Retry

    def graceful_timeout_s(self) -> float:
        """How long a worker may take to finish, as configured now."""


class Supervision:
    """Makes each part and passes it the others that it uses. Each part's class says what it does.

    Args:
        pool: has the other parts. It is used here only, and passed to none of them.
        changed: called with each worker whose state has changed.
        start_drain: waits until no connection waits for a worker; None: `Drainer` does.
    """

    def __init__(
        self,
        pool: LooplessParts,
        loop: AbstractEventLoop,
        changed: Callable[[WorkerHandle], None],
        start_drain: StartDrain | None,
    ) -> None:
        for each in (pool.retry, pool.selection, pool.entries, pool.shutdown):
            each.watch(loop)
        self._pool = pool
        self._loop = loop
        self.startup = Startup(loop, pool.workers)
        self._worker_log = WorkerLog(pool.log, self.startup, pool.shutdown)
        self.transitions = Transitions(
            pool.workers, pool.entries, pool.shutdown, pool.retry, changed
        )
        report = self.transitions.report
        self._failures = Failures(self.transitions, self.startup)
        self._removal = SocketRemoval(pool.selection, pool.shutdown, pool.log, pool.retry)
        self.pinning = InSteps(loop, self._pin)
        self.spares = self._make_spares()
        self.ends = self._make_ends()
        deadlines = self._make_deadlines()
        drain = start_drain or self._make_drainer().begin
        termination = Termination(deadlines, self.ends, pool.shutdown, self._worker_log, drain)
        self._watcher = Watcher(self.ends, deadlines, termination, pool.retry, changed)
        starter = Starter(
            pool.spawner, self._watcher, self._removal, pool.start_queue, pool.batch, pool.retry
        )
        self.queued_starts = self._make_queued_starts(starter)
        self.transitions.on_started = self.queued_starts.go_on_if_limited
        self.restarts = self._make_restarts(starter)
        forget = self._set_commands(termination)
        self.notifications = Notifications(
            pool.workers, pool.clock, pool.ignored_ready, report, changed
        )
        retiring = InSteps(loop, lambda worker: report(worker, Event.RETIRE))
        self.stopping = InSteps(
            loop,
            lambda worker: report(worker, Event.STOP),
            pool.shutdown.end_if_empty,
            pool.retry.spare.lent,
        )
        self.replacement = Replacement(
            pool.selection.publisher, starter, self.transitions, self.spares, forget, retiring
        )

    def _make_spares(self) -> Spares:
        pool = self._pool
        return Spares(
            pool.workers,
            pool.selection,
            pool.entries,
            pool.shutdown,
            pool.log,
            self.pinning.begin_soon,
            lambda: self._backoff.end_if_service_is_up(),
        )

    def _make_ends(self) -> Ends:
        pool = self._pool
        ended = EndedWorkers(
            pool.workers,
            pool.selection,
            self._removal,
            self._failures,
            pool.shutdown,
            self._worker_log,
            pool.retry,
        )
        return Ends(
            self._loop,
            pool.retry,
            self.spares.replace,
            ended.first_ended,
            ended.all_ended,
            before=pool.entries.drop,
        )

    def _make_deadlines(self) -> Deadlines:
        pool = self._pool
        return Deadlines(
            pool.workers,
            self.transitions,
            pool.shutdown,
            pool.visibility,
            self._worker_log,
            pool.clock,
            pool.retry,
            pool.graceful_timeout_s,
        )

    def _make_drainer(self) -> Drainer:
        pool = self._pool
        return Drainer(
            self._loop,
            pool.remains,
            pool.selection.publisher,
            pool.clock,
            pool.retry,
            self.transitions.report,
            pool.graceful_timeout_s,
        )

    def _make_queued_starts(self, starter: Starter) -> QueuedStarts:
        return QueuedStarts(
            self._loop,
            self._pool.start_queue,
            starter,
            self._failures,
            self.startup,
            self._pool.shutdown,
            self._worker_log,
        )

    def _make_restarts(self, starter: Starter) -> Restarts:
        return Restarts(
            self._loop,
            starter,
            self._pool.selection,
            self.transitions,
            self._failures,
            self._pool.shutdown,
            self._worker_log,
        )

    def _set_commands(self, termination: Termination) -> Callable[[WorkerHandle], None]:
        """Say how each command of `lifecycle` is carried out. Returns how FORGET is."""
        pool = self._pool
        self._backoff = Backoff(
            pool.workers, self.restarts, self.startup, self._worker_log, pool.clock
        )
        activation = Activation(
            pool.workers,
            pool.selection,
            self._backoff,
            self.spares,
            pool.shutdown,
            self._worker_log,
            pool.clock,
            pool.retry,
        )
        self.transitions.commands = {
            Command.SPAWN: self.restarts.restart,
            Command.ACTIVATE: activation.activate,
            Command.DEACTIVATE: activation.deactivate,
            Command.REPLACE: self.spares.replace,
            Command.MIGRATE_QUEUE: pool.migration.migrate_hung,
            Command.DRAIN: termination.drain,
            Command.TERMINATE: termination.terminate,
            Command.KILL: termination.kill,
            Command.BACK_OFF: self._backoff.begin,
            Command.FORGET: activation.forget,
        }
        return activation.forget

    def _pin(self, worker: WorkerHandle) -> None:
        self._pool.retry.attempt(f"pin worker {worker.slot}", worker.pin)

    def begin(self) -> None:
        """Watch the workers that exist already."""
        for worker in list(self._pool.workers):
            if worker.process is not None:
                self._watcher.watch(worker, worker.process)
            elif worker.starts:
                self._worker_log.ended_unsupervised(worker)
                self.transitions.report(worker, Event.EXITED)
        self.spares.replace_failed()
        if any(worker.serves for worker in self._pool.workers):
            self.startup.succeed()
            self._pool.selection.publisher.now()
