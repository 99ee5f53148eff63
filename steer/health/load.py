"""Tells the backend what waits at each worker, where the kernel does not count connections."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from steer.workers.pool import WorkerPool
from steer.workers.process import WorkerProcess
from steer.workers.queues import Table, unchanged

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, TimerHandle

_SAMPLED_PER_S = 20_000
_SAMPLE_S = 0.02


class LoadSampler:
    """Looks at the queues of all workers, as long as the backend has to be told."""

    def __init__(self, pool: WorkerPool, loop: AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._timer: TimerHandle | None = None
        self._sampled: Sequence[Table | None] = ()

    def changed(self) -> None:
        """A worker is in another state."""
        self._sampled = ()
        self.begin()

    def begin(self) -> None:
        """Unless it has begun."""
        if self._timer is None:
            self._sample()

    def _sample(self) -> None:
        self._timer = None
        if (tell := self._pool.backend.tell_waiting) is None:
            return
        number = len(self._pool.workers)
        self._timer = self._loop.call_later(max(_SAMPLE_S, number / _SAMPLED_PER_S), self._sample)
        sampled = tables(self._pool)
        if None not in sampled and unchanged(sampled, self._sampled):
            return
        self._sampled = sampled
        for worker in self._pool.workers:
            if worker.process and worker.serves:
                sample = partial(tell, worker.slot, self._waiting(worker.process))
                self._pool.retry.attempt(f"tell what waits for worker {worker.slot}", sample)

    def _waiting(self, process: WorkerProcess) -> int:
        """Connections in its queues; 0 where that cannot be seen."""
        over_tcp = [bind.protocol == "tcp" for bind in process.launch.binds]
        queues = self._pool.queues.of(process) or {}
        return sum(found.queued for at, found in queues.items() if over_tcp[at])


def tables(pool: WorkerPool) -> Sequence[Table | None]:
    """What there is at each address of the service."""
    return [pool.queues.at(bind) for bind in pool.generation.plan.binds]
