"""When to look at which workers from outside."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from steer.health import capacity, hangs
from steer.health.hangs import Hangs
from steer.health.load import BusyWorkers, LoadSampler
from steer.health.readiness import Readiness
from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_LOOKING_S = _BREAK_S = 0.005
"""The time for looks at workers in one turn of the loop, and the time until they continue."""
_LOOKS = 4
"""Looks in one --hang-timeout while a worker has connections; more while some are queued."""
_RESTING_LOOKS = 2
"""Looks while no worker has any: a timeout begins with the look that finds a connection."""
_SELDOM_S = 1.0
_LOGGED_S = 1.0
"""A time in which the controller did not run is logged from this length on."""


class Health:
    """Looks at workers that may be hung, at capacity or ready by now.

    Args:
        pool: gets the events.
        replace: requests a replacement for a hung worker.
        receive_all: reads the notifications of workers that were not read yet.
    """

    def __init__(
        self,
        pool: WorkerPool,
        loop: AbstractEventLoop,
        replace: Callable[[WorkerHandle], None],
        receive_all: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._retry = pool.retry
        self._receive_all = receive_all
        self._stops = 0
        self._readiness = Readiness(pool, loop)
        self._load = LoadSampler(pool, loop)
        self._busy = BusyWorkers(pool)
        self._hangs = Hangs(pool, replace)
        self._watched: set[WorkerHandle] | None = None
        self._to_look_at: deque[WorkerHandle] = deque()
        self._due = pool.looks.add("look at workers", self._tick, _SELDOM_S)
        self.reconfigure()

    def changed(self, worker: WorkerHandle) -> None:
        """A worker's state has changed."""
        if worker.has_triggered_watchdog:
            self._watch(worker)
            self._due.within(_BREAK_S)
        self._load.changed()
        self._readiness.changed(worker)

    def reconfigure(self) -> None:
        """The configuration may have changed."""
        self._hangs.forget()
        self._pool.visibility.forget()
        self._pool.clock.measure(*self._limits_s)
        self._watched = None
        if limits_s := self._limits_s:
            self._due.within(min(limits_s) / _LOOKS)
        self._load.begin()

    @property
    def _limits_s(self) -> list[float]:
        service = self._pool.service
        return [each for each in (service.hang_timeout, service.watchdog) if each]

    def _tick(self) -> float:
        """Look at some of the workers that need it. Returns in how many seconds to continue."""
        limits_s = self._limits_s
        if not limits_s or self._pool.shutdown.has_begun:
            return math.inf
        if not self._to_look_at:
            self._retry.attempt("begin to look at workers", self._begin_round)
        if not self._look_at_some():
            return _BREAK_S
        exclude = partial(
            capacity.exclude, self._pool.workers, self._watched or (), self._pool.migration
        )
        self._retry.attempt("exclude workers at capacity", exclude)
        if any(worker.queued and not worker.is_hung for worker in self._watched or ()):
            return min(limits_s) / _LOOKS / 4
        if self._watched or self._has_watchdog or self._hangs.has_histories:
            return min(limits_s) / _LOOKS
        return min(_SELDOM_S, min(limits_s) / _RESTING_LOOKS)

    @property
    def _has_watchdog(self) -> bool:
        return bool(self._pool.service.watchdog)

    def _begin_round(self) -> None:
        """Select the workers to look at: those with connections, those that were suspect at the
        last look, and those that missed their watchdog."""
        self._reset_after_a_gap()
        workers, now_s = self._pool.workers, self._pool.clock.now_s()
        silent = hangs.silent(workers, now_s) if self._has_watchdog else set[WorkerHandle]()
        if silent:
            self._receive_all()
        if self._watched is None:
            suspects = set(workers)
        else:
            suspects = {*silent, *self._watched, *self._busy.find()}
        suspects_running = [worker for worker in suspects if worker.process]
        self._to_look_at.extend(sorted(suspects_running, key=lambda worker: worker.slot))
        self._watched = set()
        self._hangs.begin(suspects_running)

    def _reset_after_a_gap(self) -> None:
        """If the controller did not run for a while, it received nothing from workers, and workers
        may not have run either. So all their timeouts begin again."""
        clock = self._pool.clock
        now_s = clock.now_s()
        if clock.stops == self._stops:
            return
        self._stops = clock.stops
        if clock.stopped_s >= _LOGGED_S:
            self._pool.log.warning("this controller did not run for %.1f s", clock.stopped_s)
        self._hangs.forget()
        for worker in self._pool.workers:
            if not worker.has_triggered_watchdog:
                worker.heartbeat_s = now_s

    def _look_at_some(self) -> bool:
        """Look at workers as long as there is time. Returns whether that was enough for all."""
        ends_s = time.monotonic() + _LOOKING_S
        while self._to_look_at:
            worker = self._to_look_at.popleft()
            look = partial(self._hangs.look_at, worker)
            if self._retry.result(f"look at worker {worker.slot}", look, True):
                self._watch(worker)
            if time.monotonic() >= ends_s:
                break
        return not self._to_look_at

    def _watch(self, worker: WorkerHandle) -> None:
        """Look at the worker in the next round even if it has no connections."""
        if self._watched is not None:
            self._watched.add(worker)
