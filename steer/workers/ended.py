"""What follows when workers have ended: sockets, processes left behind, the log, the next state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from steer.linux.retry import Retry
from steer.workers import endings
from steer.workers.ends import End
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.process import WorkerProcess
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.socket_removal import SocketRemoval
from steer.workers.transitions import Failures
from steer.workers.worker_log import WorkerLog


class EndedWorkers:
    """Handles workers whose processes have ended, as `Ends` finds them.

    Args:
        workers: all workers of the pool.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        selection: Selection,
        removal: SocketRemoval,
        failures: Failures,
        shutdown: Shutdown,
        worker_log: WorkerLog,
        retry: Retry,
    ) -> None:
        self._workers = workers
        self._selection = selection
        self._removal = removal
        self._failures = failures
        self._shutdown = shutdown
        self._worker_log = worker_log
        self._retry = retry

    def first_ended(self, ends: Sequence[End]) -> None:
        """The first processes of these workers have ended. Their other processes are still
        running, and may have the workers' sockets open."""
        self._removal.remove_all((each, each.others) for each in ends)

    def all_ended(self, ends: Sequence[End]) -> None:
        """These workers have ended, and none of their processes is waited for any more."""
        for each in ends:
            each.worker.cancel_timer()
        with self._selection.together() as order:  # the guard has none of their sockets
            leaving = sorted(ends, key=lambda each: order.get(each.worker.slot, len(order)))
            self._removal.remove_all((each, each.process.left_behind) for each in leaving)
        for each in ends:
            self._end(each.worker, each.process, each.status)

    def _end(self, worker: WorkerHandle, gone: WorkerProcess, status: int | None) -> None:
        if gone.left_behind:
            take = partial(self._shutdown.take_leftovers, gone.left_behind)
            self._retry.attempt(f"end what worker {worker.slot} left behind", take)
        act = f"worker {worker.slot}: it has ended"
        report = partial(self._report, worker, gone, status)
        self._retry.until_done(act, report, lambda: worker.process is gone)

    def _report(self, worker: WorkerHandle, gone: WorkerProcess, status: int | None) -> None:
        """The worker loses its process only after everything that may fail and is retried."""
        has_served = worker.ready_s is not None
        error = gone.problem or endings.why(gone, status, has_served=has_served)
        self._workers.by_pid.pop(gone.pid, None)
        worker.lost_process()
        self._worker_log.ended(worker, gone, status, error)
        self._failures.ended(worker, error)
