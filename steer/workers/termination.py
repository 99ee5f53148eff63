"""Draining workers, telling them to finish, and killing them."""

from __future__ import annotations

from collections.abc import Callable

from steer.workers import elsewhere
from steer.workers.deadlines import Deadlines
from steer.workers.ends import Ends
from steer.workers.handle import Cancellable, WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.shutdown import Shutdown
from steer.workers.worker_log import WorkerLog

StartDrain = Callable[[WorkerHandle], Cancellable]
"""Waits until no connection waits for a worker, reports that, then migrates what comes later."""


class Termination:
    """Drains workers, tells them to finish, and kills those that do not.

    Args:
        start_drain: see `StartDrain`.
    """

    def __init__(
        self,
        deadlines: Deadlines,
        ends: Ends,
        shutdown: Shutdown,
        worker_log: WorkerLog,
        start_drain: StartDrain,
    ) -> None:
        self._deadlines = deadlines
        self._ends = ends
        self._shutdown = shutdown
        self._worker_log = worker_log
        self._start_drain = start_drain

    def drain(self, worker: WorkerHandle) -> None:
        """Wait until no connection waits for the worker."""
        self._deadlines.finish_gracefully(worker)
        worker.drain = self._start_drain(worker)

    def terminate(self, worker: WorkerHandle) -> None:
        """Tell the worker to finish."""
        if self._shutdown.has_begun:
            # There is no worker left to which its queue could be migrated.
            worker.cancel_drain()
            self._deadlines.finish_within(worker, self._shutdown.within_s)
        elif worker.drain is None:  # else its time runs already
            self._deadlines.finish_gracefully(worker)
        if worker.process:
            # One that was never ready has nothing to finish, and may not handle its signal yet.
            quick = self._shutdown.is_quick or worker.ready_s is None
            worker.process.terminate(quick)
            self._worker_log.signal(worker.process)
        if worker.was_hung and not self._shutdown.has_begun:
            self._deadlines.measure_cpu(worker)

    def kill(self, worker: WorkerHandle) -> None:
        """Kill all processes of the worker."""
        if not worker.process:
            return
        if worker.state is State.STARTING:
            worker.process.problem = elsewhere.not_ready(worker.process)
        self._ends.kill(worker.process)
