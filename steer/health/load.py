"""Which workers have connections, and how many wait at each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from steer.workers.handle import WorkerHandle
from steer.workers.looks import TOGETHER_S, on_the_beat
from steer.workers.pool import WorkerPool
from steer.workers.process import WorkerProcess
from steer.workers.queues import Table, unchanged

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, TimerHandle

_SAMPLED_PER_S = 20_000
_SAMPLE_S = 0.02
_SELDOM_S = 1.0
_QUEUES_PER_S = 250
"""The kernel is asked for so many queues in a second while it counts connections and there are
none: a connection may wait that came before its listener was counted."""


class LoadSampler:
    """Tells the backend how many connections wait at each worker, if the kernel does not count
    connections."""

    def __init__(self, pool: WorkerPool, loop: AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._timer: TimerHandle | None = None
        self._sampled: Sequence[Table | None] = ()

    def changed(self) -> None:
        """A worker's state has changed."""
        self._sampled = ()
        self.begin()

    def begin(self) -> None:
        """Begin, unless that was done."""
        if self._timer is None:
            self._sample()

    def _sample(self) -> None:
        self._timer = None
        if (write := self._pool.backend.write_waiting) is None:
            return
        number = len(self._pool.workers)
        self._timer = self._loop.call_later(max(_SAMPLE_S, number / _SAMPLED_PER_S), self._sample)
        sampled = tables(self._pool)
        if None not in sampled and unchanged(sampled, self._sampled):
            return
        self._sampled = sampled
        for worker in self._pool.workers:
            if worker.process and worker.serves:
                sample = partial(write, worker.slot, self._waiting(worker.process))
                self._pool.retry.attempt(f"read the queues of worker {worker.slot}", sample)

    def _waiting(self, process: WorkerProcess) -> int:
        """The connections in its accept queues, or 0 if they cannot be seen."""
        over_tcp = [bind.protocol == "tcp" for bind in process.launch.binds]
        queues = self._pool.queues.of(process) or {}
        return sum(found.queued for at, found in queues.items() if over_tcp[at])


def tables(pool: WorkerPool) -> Sequence[Table | None]:
    """The sockets at each bind of the service."""
    return [pool.queues.at(bind) for bind in pool.binds]


class BusyWorkers:
    """Finds the workers that have connections, or at which some wait."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._queues: Sequence[Table | None] = ()
        self._queues_due_s = 0.0
        self._some_waited = False

    def find(self) -> Iterable[WorkerHandle]:
        """The workers that have connections; all workers if that is not known."""
        busy = self._pool.backend.busy()
        workers, now_s = self._pool.workers, self._pool.clock.read_s()
        found = [worker for worker in workers if worker.slot in busy] if busy else []
        if busy is not None and now_s < self._queues_due_s:
            return found
        after_s = max(_SELDOM_S, len(workers) / _QUEUES_PER_S)
        self._queues_due_s = on_the_beat(now_s, after_s) - TOGETHER_S
        queues = tables(self._pool)
        if None in queues:
            return workers
        if unchanged(queues, self._queues) and not self._some_waited:
            return found
        self._queues = queues
        return found + self._with_queues(queues)

    def _with_queues(self, queues: Sequence[Table | None]) -> list[WorkerHandle]:
        """The workers at whose sockets something waits."""
        waiting = {
            inode for table in queues for inode, each in (table or {}).items() if each.queued
        }
        self._some_waited = bool(waiting)
        if not waiting:
            return []
        return [
            worker
            for worker in self._pool.workers
            if worker.process and not waiting.isdisjoint(worker.process.bound)
        ]
