"""The commands of `lifecycle`, as they are carried out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.workers import elsewhere, lifecycle
from steer.workers.clock import Clock
from steer.workers.ends import Ends
from steer.workers.handle import Cancellable, WorkerHandle, WorkerHandles
from steer.workers.lifecycle import Command, Event, State
from steer.workers.migration import QueueMigration
from steer.workers.process import WorkerProcess
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.starter import Starter
from steer.workers.startup import Startup
from steer.workers.transitions import CommandTable, Transitions

StartDrain = Callable[[WorkerHandle], Cancellable]
"""Looks whether anything waits for a worker, until nothing does, reports that, and then sees that
it stays so."""


class Commands:
    """Carries them out.

    Args:
        workers: all workers there are; one that is forgotten is removed from them.
        start_drain: begins to wait until nothing waits for a worker.
        graceful_timeout_s: how long a worker may take to finish, as configured now.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        selection: Selection,
        migration: QueueMigration,
        starter: Starter,
        ends: Ends,
        transitions: Transitions,
        startup: Startup,
        shutdown: Shutdown,
        clock: Clock,
        log: Log,
        retry: Retry,
        start_drain: StartDrain,
        graceful_timeout_s: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._selection = selection
        self._migration = migration
        self._starter = starter
        self._ends = ends
        self._transitions = transitions
        self._startup = startup
        self._shutdown = shutdown
        self._clock = clock
        self._log = log
        self._retry = retry
        self._start_drain = start_drain
        self._graceful_timeout_s = graceful_timeout_s
        self._said_why: set[str] = set()

    @property
    def table(self) -> CommandTable:
        """How each command is carried out."""
        return {
            Command.SPAWN: self._starter.restart,
            Command.ACTIVATE: self._activate,
            Command.DEACTIVATE: self._deactivate,
            Command.MIGRATE_QUEUE: self._migration.migrate_hung,
            Command.DRAIN: self._drain,
            Command.TERMINATE: self._terminate,
            Command.KILL: self._kill,
            Command.BACK_OFF: self._back_off,
            Command.FORGET: self.forget,
        }

    def _activate(self, worker: WorkerHandle) -> None:
        worker.cancel_timer()
        if not worker.held:
            self._selection.publish_soon()
        got_ready = partial(worker.got_ready, self._clock.now_s())
        self._retry.attempt(f"look at worker {worker.slot}", got_ready)
        self._log.info("worker %d ready", worker.slot)
        if worker.on_outcome:
            worker.on_outcome(worker)
        if self._startup.succeed():
            for each in self._workers:
                if each.state is State.BACKOFF and each.starts:  # it may have waited for this
                    self._restart_later(each, 0.0)

    def _deactivate(self, worker: WorkerHandle) -> None:
        if not self._shutdown.has_begun and not worker.leaving:
            self._selection.publish_soon()

    def _drain(self, worker: WorkerHandle) -> None:
        self._transitions.report_later(worker, self._graceful_timeout_s(), Event.OVERDUE)
        worker.drain = self._start_drain(worker)

    def _terminate(self, worker: WorkerHandle) -> None:
        if self._shutdown.has_begun:
            # There is no worker left that what waits for it could be moved to.
            worker.cancel_drain()
            self._transitions.report_later(worker, self._shutdown.within_s, Event.OVERDUE)
        elif worker.drain is None:  # else its time runs already
            self._transitions.report_later(worker, self._graceful_timeout_s(), Event.OVERDUE)
        if worker.process:
            # One that was never ready has nothing to finish, and may not yet know its own signal.
            quick = self._shutdown.is_quick or worker.ready_s is None
            worker.process.terminate(quick)
            self._log_why_this_signal(worker.process)
        if worker.was_hung and not self._shutdown.has_begun:
            # So that it can be asked later whether it has acted since.
            look = partial(worker.has_computed, self._clock.now_s())
            self._retry.attempt(f"look at worker {worker.slot}", look)

    def _log_why_this_signal(self, process: WorkerProcess) -> None:
        """All of them are alike, so it is said once."""
        why = process.why_this_signal
        if why and why not in self._said_why:
            self._said_why.add(why)
            self._log.info("workers are told to finish by %s", why)

    def _kill(self, worker: WorkerHandle) -> None:
        if not worker.process:
            return
        if worker.state is State.STARTING:
            worker.process.problem = elsewhere.not_ready(worker.process)
        self._ends.kill(worker.process)

    def _back_off(self, worker: WorkerHandle) -> None:
        after_s = lifecycle.backoff_s(worker.failures, worker.ready_s is not None)
        worker.ready_s = None
        if self._startup.listens_elsewhere:
            # Another one would fail as this one has, until that one is ready or has failed.
            after_s = worker.generation.plan.service.ready_timeout
        elif after_s and self._startup.has_succeeded:
            self._log.warning("worker %d failed again; another in %g s", worker.slot, after_s)
        self._restart_later(worker, after_s)

    def _restart_later(self, worker: WorkerHandle, after_s: float) -> None:
        worker.set_timer(self._clock.call_later(after_s, self._starter.restart_soon, worker))

    def forget(self, worker: WorkerHandle) -> None:
        """There is no such worker any more."""
        worker.cancel_timer()
        worker.cancel_drain()
        self._selection.give_up(worker.slot)
        self._workers.remove(worker)
        self._shutdown.end_if_empty()
