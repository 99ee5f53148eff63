"""Workers that wait for their first start, and how many may be starting at once."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from steer.workers import lifecycle
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Event, State

_NO_LIMIT = sys.maxsize


class StartQueue:
    """Workers that were never started, in their order.

    Args:
        workers: all workers of the pool.

    Attributes:
        is_of_new_service: whether the service is new. If not, it was adopted, and gets the
            workers that it lacks.
        is_paused: whether no worker is started, as none could load the application yet.
    """

    def __init__(self, workers: Collection[WorkerHandle]) -> None:
        self.is_of_new_service = self.is_paused = False
        self._workers = workers
        self._waiting: deque[WorkerHandle] = deque()
        self._starting: dict[WorkerHandle, None] = {}
        self._most_starting = _NO_LIMIT

    def add(self, worker: WorkerHandle) -> None:
        """Append the worker."""
        worker.state = State.BACKOFF
        self._waiting.append(worker)

    def clear(self) -> None:
        """Start none of the waiting workers."""
        self._waiting.clear()

    def limit(self, most_starting: int) -> None:
        """Let at most so many workers be starting at once."""
        self._most_starting = most_starting

    def lift_limit(self) -> None:
        """Let any number of workers be starting at once."""
        self._most_starting = _NO_LIMIT

    @property
    def is_limited(self) -> bool:
        """Whether workers wait that the limit may hold back."""
        return bool(self._waiting) and self._most_starting < len(self._workers)

    def began(self, workers: Iterable[WorkerHandle]) -> None:
        """These workers have a process now."""
        if self.is_limited:
            self._starting |= dict.fromkeys(workers)

    def next(self, at_most: int) -> Sequence[WorkerHandle]:
        """Remove and return the next workers that are still wanted, as the limit allows."""
        few: list[WorkerHandle] = []
        if self.is_paused:
            return few
        if self.is_limited:
            # Only workers that began are looked at, as all may be many more.
            self._starting = dict.fromkeys(filter(_is_starting, self._starting))
            at_most = min(at_most, self._most_starting - len(self._starting))
        while self._waiting and len(few) < at_most:
            worker = self._waiting.popleft()
            if worker.state is State.BACKOFF:
                worker.state, _ = lifecycle.step(worker.state, Event.RETRY)
                few.append(worker)
        return few


def _is_starting(worker: WorkerHandle) -> bool:
    return worker.process is not None and worker.state is State.STARTING
