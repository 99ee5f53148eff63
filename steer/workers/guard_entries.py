"""What the guard stores of each worker, for a controller that adopts it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from steer.guard.client import GuardClient
from steer.linux.retry import Retry
from steer.workers.handle import WorkerHandle
from steer.workers.process import WorkerProcess
from steer.workers.selection import Selection
from steer.workers.stored_worker import stored

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class GuardEntries:
    """Keeps the guard's entries of workers up to date.

    A worker may change several times in one turn of the loop; its entry is written once, after
    that turn. A controller that adopts it meanwhile finds it as it was a moment ago.

    Args:
        selection: names the descriptors that the backend holds of a worker.
    """

    def __init__(self, guard: GuardClient, selection: Selection, retry: Retry) -> None:
        self._guard = guard
        self._selection = selection
        self._retry = retry
        self._unsaved: dict[WorkerHandle, None] = {}
        self._loop: AbstractEventLoop

    def watch(self, loop: AbstractEventLoop) -> None:
        """Use this event loop from here on. `save_soon` needs it."""
        self._loop = loop

    def save_soon(self, worker: WorkerHandle) -> None:
        """Save the worker after this turn of the loop."""
        if not self._unsaved:
            self._loop.call_soon(self.flush)
        self._unsaved[worker] = None

    def flush(self) -> None:
        """Save now what the end of this turn would save."""
        unsaved, self._unsaved = self._unsaved, {}
        self.save(unsaved)

    def save(self, workers: Collection[WorkerHandle], look: bool = True) -> None:
        """Save all of these workers in one message; if that fails, each in its own.

        Args:
            look: see `WorkerProcess.keep`.
        """

        def keep() -> None:
            with self._guard.together():
                for worker in workers:
                    self.write(worker, look)

        if not self._retry.attempt("save workers", keep):
            for worker in workers:
                self.save_one(worker)

    def save_one(self, worker: WorkerHandle) -> None:
        """Save the worker in a message of its own."""
        act = f"save worker {worker.slot}"
        self._retry.attempt(act, partial(self.write, worker))

    def write(self, worker: WorkerHandle, look: bool = True) -> None:
        """Save the worker now, if it has a process. Raises OSError: the guard cannot store it."""
        if worker.process is not None:
            value = msgspec.json.encode(stored(worker, worker.process.running))
            held = self._selection.backend.held(worker.slot)
            worker.process.keep(value, held, look)

    def drop(self, processes: Iterable[WorkerProcess]) -> None:
        """Drop the entries of processes that have ended, in one message for all."""
        self._guard.drop(*(each.key for each in processes))
