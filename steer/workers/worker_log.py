"""What is logged about workers that start, become ready, fail and end."""

from __future__ import annotations

from steer.errors import SteerError
from steer.linux import fork
from steer.linux.log import Log
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Event, State
from steer.workers.process import WorkerProcess
from steer.workers.shutdown import Shutdown
from steer.workers.startup import Startup


class WorkerLog:
    """Logs what happens to workers, unless a caller gets it as an error anyway.

    Until the service has come up, the caller that waits for that gets the reason why it failed.
    The caller that requested a held worker gets the reason why it ended.
    """

    def __init__(self, log: Log, startup: Startup, shutdown: Shutdown) -> None:
        self._log = log
        self._startup = startup
        self._shutdown = shutdown
        self._logged: set[str] = set()

    def ready(self, worker: WorkerHandle) -> None:
        as_what = " as a spare" if worker.spec.is_spare else ""
        self._log.info("worker %d ready%s", worker.slot, as_what)

    def late(self, worker: WorkerHandle) -> None:
        """The worker is not ready in time."""
        if self._startup.has_succeeded and not worker.held:
            self._log.warning("worker %d: %s", worker.slot, Event.LATE.value)

    def overdue(self, worker: WorkerHandle) -> None:
        """The worker has not finished in time."""
        self._log.warning("worker %d: %s", worker.slot, Event.OVERDUE.value)

    def backs_off(self, worker: WorkerHandle, after_s: float) -> None:
        """The next process of the worker is started after this time."""
        if after_s and self._startup.has_succeeded:
            self._log.warning("worker %d failed again; another in %g s", worker.slot, after_s)

    def signal(self, process: WorkerProcess) -> None:
        """Log which signal tells workers to finish, if their command decided that. It is logged
        once, as all workers run the same command."""
        why = process.why_this_signal
        if why and why not in self._logged:
            self._logged.add(why)
            self._log.info("workers are told to finish by %s", why)

    def not_started(self, error: SteerError) -> None:
        self._log.error("%s", error)

    def ended_unsupervised(self, worker: WorkerHandle) -> None:
        self._log.warning("worker %d ended while there was no controller", worker.slot)

    def ended(
        self, worker: WorkerHandle, gone: WorkerProcess, status: int | None, error: SteerError
    ) -> None:
        """A worker ended. This is logged only if it was not told to end. Until the service has come
        up, each kind of end is logged once, except the one that ends the service, as that is
        raised."""
        was_told = worker.state is State.STOPPING or self._shutdown.has_begun
        if was_told or worker.held:
            return
        how = fork.how_it_ended(status)
        if self._startup.has_succeeded:
            self._log.warning("worker %d (pid %d): %s", worker.slot, gone.pid, how)
            if gone.problem:
                self._log.error("%s", gone.problem)
        elif how not in self._logged and not self._startup.is_over_by(error):
            self._logged.add(how)
            self._log.warning("worker %d (pid %d): %s", worker.slot, gone.pid, error.cause)
