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
    """Logs what operators have to know, and nothing that a caller is told as an error anyway.

    Until the service has come up, whoever waits for that is told why it failed. Whoever requested
    a held worker is told how it ended.
    """

    def __init__(self, log: Log, startup: Startup, shutdown: Shutdown) -> None:
        self._log = log
        self._startup = startup
        self._shutdown = shutdown
        self._logged: set[str] = set()

    def ready(self, worker: WorkerHandle) -> None:
        self._log.info("worker %d ready", worker.slot)

    def late(self, worker: WorkerHandle) -> None:
        """It is not ready in time."""
        if self._startup.has_succeeded and not worker.held:
            self._log.warning("worker %d: %s", worker.slot, Event.LATE.value)

    def overdue(self, worker: WorkerHandle) -> None:
        """It has not finished in time."""
        self._log.warning("worker %d: %s", worker.slot, Event.OVERDUE.value)

    def backs_off(self, worker: WorkerHandle, after_s: float) -> None:
        """Its next process is started after so long."""
        if after_s and self._startup.has_succeeded:
            self._log.warning("worker %d failed again; another in %g s", worker.slot, after_s)

    def signal(self, process: WorkerProcess) -> None:
        """Which signal tells it to finish, if its command decided that. It is logged once, as
        all workers run the same command."""
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
        """It ended although nobody told it to. Until the service has come up, each kind of end is
        logged once, except the one that ends the service, as that is raised."""
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
