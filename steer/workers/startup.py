"""Whether the service has come up, and whether it still can."""

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
"""The most starting workers to look at in a turn of the loop. All run the same program."""


class Startup:
    """The service has come up when its first worker is ready. It cannot come up any more when
    the application cannot be loaded, or when all workers have failed once.

    Args:
        workers: the workers so far. Report later ones with `add`.

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
        """Whether the service has come up. Until then, errors are raised to whoever awaits `up`."""
        return self.up.done() and self.up.exception() is None

    @property
    def has_failed(self) -> bool:
        """Whether the service cannot come up."""
        return self.up.done() and self.up.exception() is not None

    def add(self, worker: WorkerHandle) -> None:
        """A worker was added to the pool."""
        if not self.up.done():
            self._candidates.append(worker)

    def succeed(self) -> bool:
        """A worker is ready, or none need be waited for. Returns whether this is the first time."""
        if self.up.done():
            return False
        self.up.set_result(None)
        self._candidates.clear()
        return True

    def fail(self, error: SteerError) -> None:
        """A worker has failed with this error. If no other can become ready, `up` gets it."""
        if not self.up.done() and self.is_over_by(error):
            _refuse(self.up, error)

    def refuse(self, error: SteerError) -> None:
        """Some workers cannot be started, and the service has to stop."""
        future = self.refused if self.up.done() else self.up
        if not future.done():
            _refuse(future, error)

    def is_over_by(self, error: SteerError) -> bool:
        """Whether a service that has not come up cannot come up any more."""
        # Each is removed once. To look at all of them at each failure would be quadratic.
        while self._candidates and _has_failed(self._candidates[-1]):
            self._candidates.pop()
        return isinstance(error, AppLoadError) or not self._candidates

    @property
    def listens_elsewhere(self) -> bool:
        """Whether no worker is ready, and one listens on an address of its own. The others would
        fail to bind that address."""
        if self.up.done():
            return False
        if not self._has_looked:
            # All workers may end at once. One look in a turn of the loop serves all.
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
        pairs = ((worker, worker.process) for worker in starting if worker.process)
        looked_at = islice(pairs, _LOOKED_AT)
        return next((each for each in looked_at if elsewhere.diagnosis(each[1])), None)


def _refuse(future: Future[None], error: SteerError) -> None:
    future.set_exception(error)
    future.exception()  # retrieved here: nobody may be waiting yet


def _has_failed(worker: WorkerHandle) -> bool:
    return worker.failures > 0 or worker.state is State.GONE
