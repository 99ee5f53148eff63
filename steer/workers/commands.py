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
        places: all workers there are; one that is forgotten is removed from them.
        start_drain: begins to wait until nothing waits for a worker.
        graceful_timeout_s: how long a worker may take to finish, as configured now.
    """

    def __init__(
        self,
        places: WorkerHandles,
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
        self._places = places
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

    def _activate(self, place: WorkerHandle) -> None:
        place.cancel_timer()
        if not place.held:
            self._selection.flip_soon()
        got_ready = partial(place.got_ready, self._clock.now_s())
        self._retry.attempt(f"look at worker {place.slot}", got_ready)
        self._log.info("worker %d ready", place.slot)
        if place.told:
            place.told(place)
        if self._startup.succeed():
            for each in self._places:
                if each.state is State.BACKOFF and each.starts:  # it may have waited for this
                    self._restart_later(each, 0.0)

    def _deactivate(self, place: WorkerHandle) -> None:
        if not self._shutdown.has_begun and not place.leaving:
            self._selection.flip_soon()

    def _drain(self, place: WorkerHandle) -> None:
        self._transitions.report_later(place, self._graceful_timeout_s(), Event.OVERDUE)
        place.drain = self._start_drain(place)

    def _terminate(self, place: WorkerHandle) -> None:
        if self._shutdown.has_begun:
            # There is no worker left that what waits for it could be moved to.
            place.cancel_drain()
            self._transitions.report_later(place, self._shutdown.within_s, Event.OVERDUE)
        elif place.drain is None:  # else its time runs already
            self._transitions.report_later(place, self._graceful_timeout_s(), Event.OVERDUE)
        if place.process:
            # One that was never ready has nothing to finish, and may not yet know its own signal.
            quick = self._shutdown.is_quick or place.ready_s is None
            place.process.terminate(quick)
            self._say_why_told_so(place.process)
        if place.hung and not self._shutdown.has_begun:
            # So that it can be asked later whether it has acted since.
            look = partial(place.has_computed, self._clock.now_s())
            self._retry.attempt(f"look at worker {place.slot}", look)

    def _say_why_told_so(self, process: WorkerProcess) -> None:
        """All of them are alike, so it is said once."""
        why = process.why_told_so
        if why and why not in self._said_why:
            self._said_why.add(why)
            self._log.info("workers are told to finish by %s", why)

    def _kill(self, place: WorkerHandle) -> None:
        if not place.process:
            return
        if place.state is State.STARTING:
            place.process.problem = elsewhere.not_ready(place.process)
        self._ends.kill(place.process)

    def _back_off(self, place: WorkerHandle) -> None:
        after_s = lifecycle.backoff_s(place.failures, place.ready_s is not None)
        place.ready_s = None
        if self._startup.listens_elsewhere:
            # Another one would fail as this one has, until that one is ready or has failed.
            after_s = place.generation.plan.service.ready_timeout
        elif after_s and self._startup.has_succeeded:
            self._log.warning("worker %d failed again; another in %g s", place.slot, after_s)
        self._restart_later(place, after_s)

    def _restart_later(self, place: WorkerHandle, after_s: float) -> None:
        place.set_timer(self._clock.call_later(after_s, self._starter.restart_soon, place))

    def forget(self, place: WorkerHandle) -> None:
        """There is no such worker any more."""
        place.cancel_timer()
        place.cancel_drain()
        self._selection.give_up(place.slot)
        self._places.remove(place)
        self._shutdown.end_if_empty()
