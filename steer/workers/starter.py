"""Starting workers: the first ones, those that are asked for, and others in place of those that
have ended."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from steer.errors import SteerError
from steer.linux.log import Log
from steer.linux.retry import Retry, as_refusal
from steer.workers import lifecycle
from steer.workers.handle import WorkerHandle
from steer.workers.intake import Lot
from steer.workers.lifecycle import Event, State
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.socket_removal import SocketRemoval
from steer.workers.spawner import Spawner
from steer.workers.start_queue import StartQueue
from steer.workers.startup import Startup
from steer.workers.transitions import Transitions
from steer.workers.watcher import Watcher

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

ALL_START_S = 1.0
"""So long after the first commands all others start, whatever has become of those."""


class Starter:
    """Starts workers in a loop, a lot in each turn: it takes time, and those that are ready
    have to be heard meanwhile.

    Args:
        queue: those that were never started.
        lot: how many start in one turn.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        queue: StartQueue,
        lot: Lot,
        spawner: Spawner,
        selection: Selection,
        removal: SocketRemoval,
        watcher: Watcher,
        transitions: Transitions,
        startup: Startup,
        shutdown: Shutdown,
        log: Log,
        retry: Retry,
    ) -> None:
        self._loop = loop
        self._queue = queue
        self._lot = lot
        self._spawner = spawner
        self._selection = selection
        self._removal = removal
        self._watcher = watcher
        self._transitions = transitions
        self._startup = startup
        self._shutdown = shutdown
        self._log = log
        self._retry = retry
        self._to_restart: deque[WorkerHandle] = deque()
        if queue.is_limited:
            loop.call_later(ALL_START_S, self._start_all)

    def start(self, *workers: WorkerHandle) -> None:
        """Start a process for each of these, and watch it.

        Raises:
            SteerError: one could not be started; then there is none.
        """
        began_s = time.monotonic()
        try:
            with self._retry.spare.lent():
                started = self._spawner.spawn(workers)
                self._queue.began(workers)
                for worker, process in zip(workers, started, strict=True):
                    self._watcher.watch(worker, process)
            self._lot.took(time.monotonic() - began_s)
        except Exception as error:  # noqa: BLE001 - no seat stays empty for it
            for worker in workers:
                if worker.process is not None:
                    self._watcher.forget(worker.process)
                self._spawner.kill(worker)
                self._removal.remove(worker)
            raise as_refusal(f"start worker {workers[0].slot}", error) from None

    # Those that were never started.

    def start_queued(self) -> None:
        """Start a lot of those in the queue, and in the next turn of the loop another."""
        few = () if self._shutdown.has_begun else self._queue.next(self._lot.size)
        if not few:
            return
        try:
            self.start(*few)
        except SteerError as error:
            if not self._queue.is_of_new_service:
                self._log.error("%s", error)
            for worker in few:
                self._fail_first(worker, error)
        self._loop.call_soon(self.start_queued)

    def start_queued_if_limited(self) -> None:
        """A worker is not starting any more, so that the limit may allow another."""
        if self._queue.is_limited:
            self._loop.call_soon(self.start_queued)

    def _start_all(self) -> None:
        """However many are still starting."""
        self._queue.lift_limit()
        self.start_queued()

    def _fail_first(self, worker: WorkerHandle, error: SteerError) -> None:
        """A new service that cannot have all its workers ends. One that was adopted goes on with
        those it has."""
        if not self._queue.is_of_new_service:
            self._fail(worker, error)
            return
        worker.state, _ = lifecycle.step(worker.state, Event.EXITED)
        self._queue.clear()
        self._startup.refuse(error)

    def _fail(self, worker: WorkerHandle, error: SteerError) -> None:
        worker.failures += 1
        self._transitions.fail(worker, error)

    # Those that have ended.

    def restart_soon(self, worker: WorkerHandle) -> None:
        """Its time to back off is over."""
        if not self._to_restart:
            self._loop.call_soon(self._restart_lot)
        self._to_restart.append(worker)

    def _restart_lot(self) -> None:
        size = min(self._lot.size, len(self._to_restart))
        lot = [self._to_restart.popleft() for _ in range(size)]
        if self._to_restart:
            self._loop.call_soon(self._restart_lot)
        # One whose wait was cut short may be there twice.
        lot = [worker for worker in dict.fromkeys(lot) if worker.state is State.BACKOFF]
        if self._shutdown.has_begun:
            for worker in lot:
                self._transitions.report_until_done(worker, Event.STOP)
        elif lot:
            for worker in lot:
                worker.state, _ = lifecycle.step(worker.state, Event.RETRY)
            self.restart(*lot)

    def restart(self, *workers: WorkerHandle) -> None:
        """Start all of these together, in slots of their own; if that fails each by itself, as
        there may be enough of what is missing for some."""
        try:
            for worker in workers:
                self._selection.give_up(worker.slot)
                worker.slot = self._selection.take_slot()
            self.start(*workers)
        except Exception as error:  # noqa: BLE001 - no seat stays empty for it
            if len(workers) > 1:
                for worker in workers:
                    self.restart(worker)
                return
            refusal = as_refusal(f"start worker {workers[0].slot}", error)
            self._log.error("%s", refusal)
            self._fail(workers[0], refusal)
