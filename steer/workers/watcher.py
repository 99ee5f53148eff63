"""Watching processes of workers from their start, or their adoption, on."""

from __future__ import annotations

from collections.abc import Callable

from steer.linux.retry import Retry
from steer.workers.ends import Ends
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Command, Event, State
from steer.workers.process import WorkerProcess
from steer.workers.transitions import Transitions


class Watcher:
    """Has the end of each process seen, and gives it its time to get ready.

    Args:
        changed: told of a worker that starts.
    """

    def __init__(
        self,
        ends: Ends,
        transitions: Transitions,
        retry: Retry,
        changed: Callable[[WorkerHandle], None],
    ) -> None:
        self._ends = ends
        self._transitions = transitions
        self._retry = retry
        self._changed = changed

    def watch(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Watch the process of this worker."""
        self._ends.watch(worker, process)
        if worker.state is State.STARTING:
            timeout_s = process.launch.service.ready_timeout
            self._transitions.report_later(worker, timeout_s, Event.LATE)
            self._changed(worker)
        else:  # adopted
            self._go_on(worker, process)

    def forget(self, process: WorkerProcess) -> None:
        """Somebody else ends it."""
        self._ends.forget(process)

    def _go_on(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Go on with what the controller before us had begun."""
        commands = self._transitions.commands
        if worker.is_hung:
            self._retry.attempt(f"look at worker {worker.slot}", worker.has_acted)
        elif worker.state is State.STOPPING:
            commands[Command.TERMINATE if process.told_to_finish else Command.DRAIN](worker)
