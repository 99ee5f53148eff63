"""What looks after the workers of a pool once there is an event loop, put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from steer.control.notify import Unheard
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.workers.clock import Clock
from steer.workers.commands import Commands, StartDrain
from steer.workers.drain import Drainer
from steer.workers.ended import EndedWorkers
from steer.workers.ends import Ends
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.intake import Lot
from steer.workers.lifecycle import Event
from steer.workers.migration import QueueMigration
from steer.workers.notifications import Notifications
from steer.workers.remains import Remains
from steer.workers.replacement import Replacement
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.socket_removal import SocketRemoval
from steer.workers.spawner import Spawner
from steer.workers.start_queue import StartQueue
from steer.workers.starter import Starter
from steer.workers.startup import Startup
from steer.workers.steps import InSteps
from steer.workers.transitions import Transitions
from steer.workers.visibility import Visibility
from steer.workers.watcher import Watcher

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class Supervision:
    """Makes each part and hands it the others that it needs. What a part does is said there.

    Args:
        changed, graceful_timeout_s, start_drain: see `Transitions` and `Commands`.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        changed: Callable[[WorkerHandle], None],
        graceful_timeout_s: Callable[[], float],
        start_drain: StartDrain | None,
        *,
        workers: WorkerHandles,
        by_pid: dict[int, WorkerHandle],
        selection: Selection,
        migration: QueueMigration,
        remains: Remains,
        entries: GuardEntries,
        queue: StartQueue,
        lot: Lot,
        spawner: Spawner,
        shutdown: Shutdown,
        visibility: Visibility,
        unheard: Unheard,
        clock: Clock,
        log: Log,
        retry: Retry,
    ) -> None:
        self._workers = workers
        self._selection = selection
        self._log = log
        for each in (retry, selection, entries, shutdown):
            each.watch(loop)
        self.startup = Startup(loop, workers)
        self.transitions = Transitions(
            workers,
            self.startup,
            shutdown,
            entries,
            visibility,
            clock,
            log,
            retry,
            changed,
            graceful_timeout_s,
        )
        report = self.transitions.report
        removal = SocketRemoval(selection, shutdown, log, retry)
        ended = EndedWorkers(
            by_pid, selection, removal, self.startup, shutdown, log, retry, self.transitions.fail
        )
        self.ends = Ends(loop, retry, ended.lose, ended.take, before=entries.drop)
        self._watcher = Watcher(self.ends, self.transitions, retry, changed)
        self.starter = Starter(
            loop,
            queue,
            lot,
            spawner,
            selection,
            removal,
            self._watcher,
            self.transitions,
            self.startup,
            shutdown,
            log,
            retry,
        )
        drainer = Drainer(loop, remains, selection, clock, retry, report, graceful_timeout_s)
        self.commands = Commands(
            workers,
            selection,
            migration,
            self.starter,
            self.ends,
            self.transitions,
            self.startup,
            shutdown,
            clock,
            log,
            retry,
            start_drain or drainer.begin,
            graceful_timeout_s,
        )
        self.transitions.commands = self.commands.table
        self.transitions.on_started = self.starter.start_queued_if_limited
        self.notifications = Notifications(workers, by_pid, clock, unheard, report, changed)
        self.pinning = InSteps(
            loop, lambda worker: retry.attempt(f"pin worker {worker.slot}", worker.pin)
        )
        self.retiring = InSteps(loop, lambda worker: report(worker, Event.RETIRE))
        self.replacement = Replacement(
            selection, self.starter, self.transitions, self.commands.forget, self.retiring
        )
        self.stopping = InSteps(
            loop,
            lambda worker: report(worker, Event.STOP),
            shutdown.end_if_empty,
            retry.spare.lent,
        )

    def begin(self) -> None:
        """Watch the workers there are."""
        for worker in list(self._workers):
            if worker.process is not None:
                self._watcher.watch(worker, worker.process)
            elif worker.starts:
                self._log.warning("worker %d ended while there was no controller", worker.slot)
                self.transitions.report(worker, Event.EXITED)
        if any(worker.serves for worker in self._workers):
            self.startup.succeed()
            self._selection.publish()
