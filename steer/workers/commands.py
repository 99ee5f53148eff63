"""Putting workers into the table, taking them out, and starting them again."""

from __future__ import annotations

from functools import partial

from steer.linux.retry import Retry
from steer.workers import lifecycle
from steer.workers.clock import Clock
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.lifecycle import State
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.spares import Spares
from steer.workers.starter import Restarts
from steer.workers.startup import Startup
from steer.workers.worker_log import WorkerLog


class Activation:
    """Puts workers into the table, takes them out of it, and drops them from the pool.

    Args:
        workers: all workers of the pool.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        selection: Selection,
        backoff: Backoff,
        spares: Spares,
        shutdown: Shutdown,
        worker_log: WorkerLog,
        clock: Clock,
        retry: Retry,
    ) -> None:
        self._workers = workers
        self._selection = selection
        self._backoff = backoff
        self._spares = spares
        self._shutdown = shutdown
        self._worker_log = worker_log
        self._clock = clock
        self._retry = retry

    def activate(self, worker: WorkerHandle) -> None:
        """The worker is ready: put it into the table, unless it is held or a spare."""
        worker.cancel_timer()
        if not worker.held:
            self._selection.publisher.soon()
        got_ready = partial(worker.got_ready, self._clock.now_s())
        self._retry.attempt(f"look at worker {worker.slot}", got_ready)
        self._worker_log.ready(worker)
        if worker.on_outcome:
            worker.on_outcome(worker)
        if worker.spec.is_spare:
            self._spares.replace_failed()
        else:
            self._backoff.end_if_service_is_up()

    def deactivate(self, worker: WorkerHandle) -> None:
        """Take the worker out of the table."""
        if not self._shutdown.has_begun and not worker.leaving:
            self._selection.publisher.soon()

    def forget(self, worker: WorkerHandle) -> None:
        """Drop the worker from the pool."""
        worker.cancel_timer()
        worker.cancel_drain()
        self._selection.release_slot(worker.slot)
        self._workers.remove(worker)
        self._shutdown.end_if_empty()


class Backoff:
    """Starts workers again whose processes have ended: soon, or after a while.

    Args:
        workers: all workers of the pool.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        restarts: Restarts,
        startup: Startup,
        worker_log: WorkerLog,
        clock: Clock,
    ) -> None:
        self._workers = workers
        self._restarts = restarts
        self._startup = startup
        self._worker_log = worker_log
        self._clock = clock

    def begin(self, worker: WorkerHandle) -> None:
        """Start the worker again, after the time that its failures ask for."""
        after_s = lifecycle.backoff_s(worker.failures, worker.ready_s is not None)
        worker.ready_s = None
        if self._startup.listens_elsewhere:
            # This one would fail again until the one that listens elsewhere is ready or fails.
            after_s = worker.service.ready_timeout
        else:
            self._worker_log.backs_off(worker, after_s)
        self._restart_after(worker, after_s)

    def end_if_service_is_up(self) -> None:
        """A worker is ready. If it is the first, all others that back off are started now, as
        they may have waited for it."""
        if self._startup.succeed():
            for worker in self._workers:
                if worker.state is State.BACKOFF and worker.starts:
                    self._restart_after(worker, 0.0)

    def _restart_after(self, worker: WorkerHandle, after_s: float) -> None:
        worker.set_timer(self._clock.call_later(after_s, self._restarts.restart_soon, worker))
