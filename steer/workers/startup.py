"""Whether a service has come up, and whether it still can."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING

from steer.errors import AppLoadError, SteerError
from steer.workers import elsewhere
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.process import WorkerProcess

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

_LOOKED_AT = 8
"""So many starting workers are looked at in a turn of the loop, as all are alike."""


class Startup:
    """A service has come up when its first worker is ready. It cannot any more when the
    application cannot be loaded, or when all workers have failed once.

    Args:
        workers: all workers there are; see `add`.

    Attributes:
        up: done when the service has come up, or holds why it cannot.
        refused: holds why the rest of the workers cannot be started, once some serve.
    """

    def __init__(self, loop: AbstractEventLoop, workers: Collection[WorkerHandle]) -> None:
        self._loop = loop
        self._workers = workers
        self._candidates = list(workers)
        self._elsewhere: tuple[WorkerHandle, WorkerProcess] | None = None
        self._has_looked = False
        self.up: Future[None] = loop.create_future()
        self.refused: Future[None] = loop.create_future()

    @property
    def has_succeeded(self) -> bool:
        """Until then whoever awaits `up` is told of an error, once."""
        return self.up.done() and self.up.exception() is None

    def add(self, worker: WorkerHandle) -> None:
        """There is another worker."""
        if not self.up.done():
            self._candidates.append(worker)

    def succeed(self) -> bool:
        """A worker is ready, or nobody need wait for one any more. Returns whether that is new."""
        if self.up.done():
            return False
        self.up.set_result(None)
        self._candidates.clear()
        return True

    def fail(self, error: SteerError) -> None:
        """A worker has failed by this error. If none is left that could get ready, `up` holds
        the error."""
        if not self.up.done() and self.is_over_by(error):
            _refuse(self.up, error)

    def refuse(self, error: SteerError) -> None:
        """Not all workers can be started, and the service is to end."""
        future = self.refused if self.up.done() else self.up
        if not future.done():
            _refuse(future, error)

    def is_over_by(self, error: SteerError) -> bool:
        """Whether the service, which has not come up, cannot any more."""
        # Each is removed once. To look at all of them at each failure would be quadratic.
        while self._candidates and _has_failed(self._candidates[-1]):
            self._candidates.pop()
        return isinstance(error, AppLoadError) or not self._candidates

    @property
    def listens_elsewhere(self) -> bool:
        """Whether, before any worker is ready, one listens on an address of its own. The others
        would fail to bind it."""
        if self.up.done():
            return False
        if not self._has_looked:
            # All may end at once, and one look in a turn of the loop is enough.
            self._has_looked = True
            self._loop.call_soon(self._look_again)
            self._elsewhere = self._one_that_listens_elsewhere()
        return self._elsewhere is not None

    def _look_again(self) -> None:
        self._has_looked = False

    def _one_that_listens_elsewhere(self) -> tuple[WorkerHandle, WorkerProcess] | None:
        if self._elsewhere is not None:
            worker, process = self._elsewhere
            if worker.process is process and worker.state is State.STARTING:
                return self._elsewhere
        starting = (each for each in self._workers if each.state is State.STARTING)
        there = ((worker, worker.process) for worker in starting if worker.process)
        looked_at = islice(there, _LOOKED_AT)
        return next((each for each in looked_at if elsewhere.diagnosis(each[1])), None)


def _refuse(future: Future[None], error: SteerError) -> None:
    future.set_exception(error)
    future.exception()  # retrieved here: nobody may be waiting yet


def _has_failed(worker: WorkerHandle) -> bool:
    return worker.failures > 0 or worker.state is State.GONE
