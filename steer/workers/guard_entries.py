"""What the guard knows of each worker, should another controller have to adopt it."""

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
        """From here on there is a loop, and `save_soon` may be called."""
        self._loop = loop

    def save_soon(self, worker: WorkerHandle) -> None:
        """Save it after this turn of the loop."""
        if not self._unsaved:
            self._loop.call_soon(self.flush)
        self._unsaved[worker] = None

    def flush(self) -> None:
        """Save now all that waits for the end of this turn."""
        unsaved, self._unsaved = self._unsaved, {}
        self.save(unsaved)

    def save(self, workers: Collection[WorkerHandle], look: bool = True) -> None:
        """All of these in one message; if that fails, each by itself.

        Args:
            look: see `WorkerProcess.keep`.
        """

        def keep() -> None:
            with self._guard.together():
                for worker in workers:
                    self.write(worker, look)

        if not self._retry.attempt("have the guard know of workers", keep):
            for worker in workers:
                self.save_one(worker)

    def save_one(self, worker: WorkerHandle) -> None:
        """In a message of its own."""
        act = f"have the guard know of worker {worker.slot}"
        self._retry.attempt(act, partial(self.write, worker))

    def write(self, worker: WorkerHandle, look: bool = True) -> None:
        """Now; nothing if it has no process. Raises OSError: the guard cannot take it."""
        if worker.process is not None:
            value = msgspec.json.encode(stored(worker, worker.process.running))
            held = self._selection.backend.held(worker.slot)
            worker.process.keep(value, held, look)

    def drop(self, processes: Iterable[WorkerProcess]) -> None:
        """These have ended. One message for all: a thousand would take the guard longer than
        everything else."""
        self._guard.drop(*(each.key for each in processes))
