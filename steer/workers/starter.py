"""Starting processes for workers: for the first time, and again after they have ended.

Starting takes time, and workers that become ready have to be handled meanwhile. So each turn of
the event loop starts one batch of workers, see `intake.Batch`.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from steer.errors import SteerError
from steer.linux.retry import Retry, as_refusal
from steer.workers import lifecycle
from steer.workers.handle import WorkerHandle
from steer.workers.intake import Batch
from steer.workers.lifecycle import Event, State
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.socket_removal import SocketRemoval
from steer.workers.spawner import Spawner
from steer.workers.start_queue import StartQueue
from steer.workers.startup import Startup
from steer.workers.transitions import Failures, Transitions
from steer.workers.watcher import Watcher
from steer.workers.worker_log import WorkerLog

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

ALL_START_S = 1.0
"""The limit on starting workers is lifted so long after the first ones were started."""


class Starter:
    """Starts processes for several workers, or for none, and watches them.

    Args:
        queue: counts the workers that are starting.
        batch: learns how long starting takes.
    """

    def __init__(
        self,
        spawner: Spawner,
        watcher: Watcher,
        removal: SocketRemoval,
        queue: StartQueue,
        batch: Batch,
        retry: Retry,
    ) -> None:
        self._spawner = spawner
        self._watcher = watcher
        self._removal = removal
        self._queue = queue
        self._batch = batch
        self._retry = retry

    @property
    def batch_size(self) -> int:
        """How many workers to start in one turn of the loop."""
        return self._batch.size

    def start(self, *workers: WorkerHandle) -> None:
        """Start a process for each of these workers.

        Raises:
            SteerError: one could not be started, and so none was.
        """
        began_s = time.monotonic()
        try:
            with self._retry.spare.lent():
                started = self._spawner.spawn(workers)
                self._queue.began(workers)
                for worker, process in zip(workers, started, strict=True):
                    self._watcher.watch(worker, process)
            self._batch.took(time.monotonic() - began_s)
        except Exception as error:  # noqa: BLE001 - whatever fails, the workers are tried again
            for worker in workers:
                if worker.process is not None:
                    self._watcher.forget(worker.process)
                self._spawner.kill(worker)
                self._removal.remove(worker)
            raise as_refusal(f"start worker {workers[0].slot}", error) from None


class QueuedStarts:
    """Starts the workers of the start queue, which have never had a process."""

    def __init__(
        self,
        loop: AbstractEventLoop,
        queue: StartQueue,
        starter: Starter,
        failures: Failures,
        startup: Startup,
        shutdown: Shutdown,
        worker_log: WorkerLog,
    ) -> None:
        self._loop = loop
        self._queue = queue
        self._starter = starter
        self._failures = failures
        self._startup = startup
        self._shutdown = shutdown
        self._worker_log = worker_log
        if queue.is_limited:
            loop.call_later(ALL_START_S, self._start_all)

    def begin(self) -> None:
        """Start one batch now, and the others in the next turns of the loop."""
        batch = () if self._shutdown.has_begun else self._queue.next(self._starter.batch_size)
        if not batch:
            return
        try:
            self._starter.start(*batch)
        except SteerError as error:
            if not self._queue.is_of_new_service:
                self._worker_log.not_started(error)
            for worker in batch:
                self._fail(worker, error)
        self._loop.call_soon(self.begin)

    def go_on_if_limited(self) -> None:
        """A worker has left the state STARTING, so the limit may allow another."""
        if self._queue.is_limited:
            self._loop.call_soon(self.begin)

    def _start_all(self) -> None:
        """Start all that wait, however many are starting."""
        self._queue.lift_limit()
        self.begin()

    def _fail(self, worker: WorkerHandle, error: SteerError) -> None:
        """A new service ends if one of its workers cannot be started. A service that was adopted
        keeps the workers it has."""
        if not self._queue.is_of_new_service:
            self._failures.not_started(worker, error)
            return
        worker.state, _ = lifecycle.step(worker.state, Event.EXITED)
        self._queue.clear()
        self._startup.refuse(error)


class Restarts:
    """Starts workers again whose processes have ended."""

    def __init__(
        self,
        loop: AbstractEventLoop,
        starter: Starter,
        selection: Selection,
        transitions: Transitions,
        failures: Failures,
        shutdown: Shutdown,
        worker_log: WorkerLog,
    ) -> None:
        self._loop = loop
        self._starter = starter
        self._selection = selection
        self._transitions = transitions
        self._failures = failures
        self._shutdown = shutdown
        self._worker_log = worker_log
        self._waiting: deque[WorkerHandle] = deque()

    def restart_soon(self, worker: WorkerHandle) -> None:
        """Restart the worker in the next turn of the loop, or a later one."""
        if not self._waiting:
            self._loop.call_soon(self._restart_lot)
        self._waiting.append(worker)

    def _restart_lot(self) -> None:
        size = min(self._starter.batch_size, len(self._waiting))
        batch = [self._waiting.popleft() for _ in range(size)]
        if self._waiting:
            self._loop.call_soon(self._restart_lot)
        # A worker whose backoff was cut short may be queued twice.
        batch = [worker for worker in dict.fromkeys(batch) if worker.state is State.BACKOFF]
        if self._shutdown.has_begun:
            for worker in batch:
                self._transitions.report_until_done(worker, Event.STOP)
        elif batch:
            for worker in batch:
                worker.state, _ = lifecycle.step(worker.state, Event.RETRY)
            self.restart(*batch)

    def restart(self, *workers: WorkerHandle) -> None:
        """Start all of these workers together, each in a new slot. If that fails, start each by
        itself: memory or descriptors may suffice for some."""
        try:
            for worker in workers:
                self._selection.release_slot(worker.slot)
                worker.slot = self._selection.take_slot()
            self._starter.start(*workers)
        except Exception as error:  # noqa: BLE001 - whatever fails, the workers are tried again
            if len(workers) > 1:
                for worker in workers:
                    self.restart(worker)
                return
            refusal = as_refusal(f"start worker {workers[0].slot}", error)
            self._worker_log.not_started(refusal)
            self._failures.not_started(workers[0], refusal)
