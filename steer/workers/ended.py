"""What follows when workers have ended: sockets, what they left behind, the log, the next state."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial

from steer.errors import SteerError
from steer.linux import fork
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.workers import endings
from steer.workers.ends import End
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.process import WorkerProcess
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.socket_removal import SocketRemoval
from steer.workers.startup import Startup


class EndedWorkers:
    """Told by `Ends` of workers that have ended.

    Args:
        by_pid: see `WorkerPool`; who has ended is removed from it.
        failed: told of each worker without a process, and why it has none.
    """

    def __init__(
        self,
        by_pid: MutableMapping[int, WorkerHandle],
        selection: Selection,
        removal: SocketRemoval,
        startup: Startup,
        shutdown: Shutdown,
        log: Log,
        retry: Retry,
        failed: Callable[[WorkerHandle, SteerError], None],
    ) -> None:
        self._by_pid = by_pid
        self._selection = selection
        self._removal = removal
        self._startup = startup
        self._shutdown = shutdown
        self._log = log
        self._retry = retry
        self._failed = failed
        self._told: set[str] = set()

    def lose(self, ends: Sequence[End]) -> None:
        """The first processes of these have ended. Others of them go on, and may have their
        sockets open."""
        self._removal.remove_all((each, each.others) for each in ends)

    def take(self, ends: Sequence[End]) -> None:
        """These have ended, and nothing of them is waited for."""
        for each in ends:
            each.worker.cancel_timer()
        with self._selection.together() as order:  # the guard has none of their sockets
            leaving = sorted(ends, key=lambda each: order.get(each.worker.slot, len(order)))
            self._removal.remove_all((each, each.process.left_behind) for each in leaving)
        for each in ends:
            self._take_one(each.worker, each.process, each.status)

    def _take_one(self, worker: WorkerHandle, gone: WorkerProcess, status: int | None) -> None:
        if gone.left_behind:
            take = partial(self._shutdown.take_leftovers, gone.left_behind)
            self._retry.attempt(f"end what worker {worker.slot} left behind", take)
        act = f"worker {worker.slot}: it has ended"
        see = partial(self._see, worker, gone, status)
        self._retry.until_done(act, see, lambda: worker.process is gone)

    def _see(self, worker: WorkerHandle, gone: WorkerProcess, status: int | None) -> None:
        """Its place is free only after the last thing that may fail."""
        has_served = worker.ready_s is not None
        error = gone.problem or endings.why(gone, status, has_served=has_served)
        how = fork.how_it_ended(status)
        self._by_pid.pop(gone.pid, None)
        worker.lost_process()
        if worker.state is not State.STOPPING and not self._shutdown.has_begun:
            self._tell(worker, gone, error, how)
        self._failed(worker, error)

    def _tell(self, worker: WorkerHandle, gone: WorkerProcess, error: SteerError, how: str) -> None:
        """Log it. Before the service has come up all may end alike: then each kind of end is
        logged once, and not the one that ends the start, as that is raised."""
        if worker.held:
            return  # whoever asked for it is told
        if self._startup.has_succeeded:
            self._log.warning("worker %d (pid %d): %s", worker.slot, gone.pid, how)
            if gone.problem:
                self._log.error("%s", gone.problem)
        elif how not in self._told and not self._startup.is_over_by(error):
            self._told.add(how)
            self._log.warning("worker %d (pid %d): %s", worker.slot, gone.pid, error.cause)
