"""Watching the processes of workers, from their start or their adoption on."""

from __future__ import annotations

from collections.abc import Callable

from steer.linux.retry import Retry
from steer.workers.deadlines import Deadlines
from steer.workers.ends import Ends
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.process import WorkerProcess
from steer.workers.termination import Termination


class Watcher:
    """Notices the end of each process, and limits the time until it is ready.

    Args:
        changed: called with each worker that starts.
    """

    def __init__(
        self,
        ends: Ends,
        deadlines: Deadlines,
        termination: Termination,
        retry: Retry,
        changed: Callable[[WorkerHandle], None],
    ) -> None:
        self._ends = ends
        self._deadlines = deadlines
        self._termination = termination
        self._retry = retry
        self._changed = changed

    def watch(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Watch the process of this worker."""
        self._ends.watch(worker, process)
        if worker.state is State.STARTING:
            self._deadlines.ready_within(worker, process.launch.service.ready_timeout)
            self._changed(worker)
        else:
            self._resume(worker, process)

    def forget(self, process: WorkerProcess) -> None:
        """Ignore the end of this process."""
        self._ends.forget(process)

    def _resume(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Continue what the previous controller had begun with an adopted worker."""
        if worker.is_hung:
            self._retry.attempt(f"look at worker {worker.slot}", worker.has_acted)
        elif worker.state is State.STOPPING:
            if process.told_to_finish:
                self._termination.terminate(worker)
            else:
                self._termination.drain(worker)
