"""Finding out from outside when a starting worker is ready."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from steer.health import pace
from steer.health.pace import Pace
from steer.linux.waiting import Seen
from steer.workers.elsewhere import ElsewhereLog
from steer.workers.handle import WorkerHandle, waits
from steer.workers.lifecycle import Event, State
from steer.workers.pool import WorkerPool
from steer.workers.process import WorkerProcess
from steer.workers.visibility import WAITS

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, TimerHandle

_LOOKING_S = 0.005
"""The time for looks at workers in one turn of the loop."""
_REST_S = 1.0
"""A worker that may not be inspected counts as ready after so long at rest."""


class Readiness:
    """Looks at starting workers, and reports those that are ready to the pool."""

    def __init__(self, pool: WorkerPool, loop: AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._pace = Pace[tuple[WorkerHandle, WorkerProcess]]()
        self._timer: TimerHandle | None = None
        self._is_looking = False
        self._notifies: int | None = None
        self._elsewhere_log = ElsewhereLog(pool.log)

    def changed(self, worker: WorkerHandle) -> None:
        """A worker's state has changed."""
        if worker.state is State.STARTING and worker.process:
            # A worker that sends READY=1 needs few looks, and mostly all workers do or none.
            says_so = self._notifies == worker.generation.number
            after_s = pace.LAST_S if says_so else pace.FIRST_S
            self._pace.add((worker, worker.process), self._loop.time(), after_s)
            if not self._is_looking:
                self._look_later()
        elif worker.state is State.READY and worker.says_ready and not self._is_looking:
            self._notifies = worker.generation.number

    def _look_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        after_s = self._pace.next_in_s(self._loop.time())
        if after_s is not None:
            self._timer = self._loop.call_later(after_s, self._look_at_starting)
        else:
            self._elsewhere_log.forget()

    def _look_at_starting(self) -> None:
        """Find the workers that wait on their sockets by now."""
        began_s = now_s = self._loop.time()
        self._is_looking = True
        for worker, process in self._pace.due(began_s):
            if worker.state is State.STARTING and worker.process is process:
                look = partial(self._look_at_start, worker, process)
                self._pool.retry.attempt(f"look at worker {worker.slot}", look)
            if worker.state is not State.STARTING or worker.process is not process:
                self._pace.remove((worker, process))
            now_s = self._loop.time()
            if now_s - began_s >= _LOOKING_S:
                break
        self._is_looking = False
        self._pace.took(now_s - began_s, now_s)
        self._look_later()

    def _look_at_start(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        if self._is_ready(worker, process):
            self._pool.report(worker, Event.READY)
        else:
            self._elsewhere_log.look(worker, process, time.monotonic() - process.started_s)

    def _is_ready(self, worker: WorkerHandle, process: WorkerProcess) -> bool:
        """Whether it waits on its sockets, or is at rest if that cannot be seen."""
        seen = waits(process)
        if seen is Seen.UNKNOWN and worker.rested_s(self._pool.clock.now_s()) >= _REST_S:
            self._pool.visibility.refused(WAITS, process)
            return True
        return seen is Seen.YES
