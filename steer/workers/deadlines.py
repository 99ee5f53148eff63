"""How long workers may take to become ready, and to finish."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from steer.linux.retry import Retry
from steer.linux.waiting import Seen
from steer.workers import elsewhere
from steer.workers.clock import Clock
from steer.workers.handle import WorkerHandle, waits
from steer.workers.lifecycle import Event
from steer.workers.shutdown import Shutdown
from steer.workers.transitions import Transitions
from steer.workers.visibility import WAITS, Visibility
from steer.workers.worker_log import WorkerLog


class Deadlines:
    """Sets one timer for each worker, and decides what follows when it expires.

    Args:
        workers: all workers of the pool.
        graceful_timeout_s: returns how long a worker may take to finish, as configured now.
    """

    def __init__(
        self,
        workers: Collection[WorkerHandle],
        transitions: Transitions,
        shutdown: Shutdown,
        visibility: Visibility,
        worker_log: WorkerLog,
        clock: Clock,
        retry: Retry,
        graceful_timeout_s: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._transitions = transitions
        self._shutdown = shutdown
        self._visibility = visibility
        self._worker_log = worker_log
        self._clock = clock
        self._retry = retry
        self._graceful_timeout_s = graceful_timeout_s

    def ready_within(self, worker: WorkerHandle, timeout_s: float) -> None:
        """The worker is killed unless it becomes ready in this time."""
        self._set_timer(worker, timeout_s, Event.LATE, self._ready_timeout)

    def finish_within(self, worker: WorkerHandle, timeout_s: float) -> None:
        """The worker is killed unless it finishes in this time."""
        self._set_timer(worker, timeout_s, Event.OVERDUE, self._finish_timeout)

    def finish_gracefully(self, worker: WorkerHandle) -> None:
        """The worker is killed unless it finishes within --graceful-timeout."""
        self.finish_within(worker, self._graceful_timeout_s())

    def measure_cpu(self, worker: WorkerHandle) -> None:
        """Record its CPU time, so that its deadline can tell whether it has computed since."""
        look = partial(worker.has_computed, self._clock.now_s())
        self._retry.attempt(f"look at worker {worker.slot}", look)

    def _set_timer(
        self,
        worker: WorkerHandle,
        timeout_s: float,
        event: Event,
        expired: Callable[[WorkerHandle], None],
    ) -> None:
        """Replace the worker's timer. What follows is retried as long as the worker exists."""
        act = f"worker {worker.slot}: {event.value}"
        wanted = partial(self._workers.__contains__, worker)
        timer = self._clock.call_later(
            timeout_s, self._retry.until_done, act, partial(expired, worker), wanted
        )
        worker.set_timer(timer)

    def _ready_timeout(self, worker: WorkerHandle) -> None:
        if self._may_be_ready(worker):
            self._transitions.report(worker, Event.READY)
        else:
            self._worker_log.late(worker)
            self._transitions.report(worker, Event.LATE)

    def _finish_timeout(self, worker: WorkerHandle) -> None:
        if self._is_computing(worker):
            self.finish_gracefully(worker)
        else:
            self._worker_log.overdue(worker)
            self._transitions.report(worker, Event.OVERDUE)

    def _may_be_ready(self, worker: WorkerHandle) -> bool:
        """Whether it may wait for connections in a way that cannot be seen."""
        if self._is_unseen(worker):
            return True
        is_elsewhere = worker.process and elsewhere.diagnosis(worker.process)
        return worker.says_ready and not is_elsewhere

    def _is_unseen(self, worker: WorkerHandle) -> bool:
        """Whether nobody can see if it waits on its sockets."""
        if worker.process is None or waits(worker.process) is not Seen.UNKNOWN:
            return False
        self._visibility.refused(WAITS, worker.process)
        return True

    def _is_computing(self, worker: WorkerHandle) -> bool:
        """Whether a worker that was retired as hung may still be working on a long request."""
        if not worker.was_hung or self._shutdown.has_begun:
            return False
        return worker.has_computed(self._clock.now_s())
