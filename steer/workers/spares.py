"""Spares: workers that are ready and not selected. One takes the place of a worker that fails.

The two exchange their specs. So the spare gets the weight and the CPUs of the other, and the other
becomes the spare: it is started again, or recovers, as one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from steer.config.plan import WorkerSpec
from steer.linux.log import Log
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.lifecycle import State
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown


def spare_for(worker: WorkerHandle, workers: Iterable[WorkerHandle]) -> WorkerHandle | None:
    """The spare to take the place of a worker that fails: the one that has been ready the longest.
    None if the worker needs no replacement, or no spare of its generation is ready. Pure."""
    comes_or_goes = worker.held or worker.is_retiring
    if worker.spec.is_spare or comes_or_goes or worker.state is State.GONE:
        return None
    ready = (
        each
        for each in workers
        if each.is_ready_spare
        and each.generation.number == worker.generation.number
        and not each.departures
        and each.process
        and not each.process.has_ended
    )
    return min(ready, key=lambda each: each.ready_s or 0.0, default=None)


def has_failed(worker: WorkerHandle) -> bool:
    """Whether it does not serve because it failed before, and has not recovered. Pure."""
    starts_again = worker.state in (State.BACKOFF, State.STARTING) and worker.failures > 0
    return worker.is_hung or starts_again


class Spares:
    """Puts spares into the places of workers that fail.

    Args:
        workers: all workers of the pool.
        pin: pins workers to the CPUs of their specs, in later turns of the loop.
        in_service: called when a spare has got into service.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        selection: Selection,
        entries: GuardEntries,
        shutdown: Shutdown,
        log: Log,
        pin: Callable[[Collection[WorkerHandle]], None],
        in_service: Callable[[], None],
    ) -> None:
        self._workers = workers
        self._selection = selection
        self._entries = entries
        self._shutdown = shutdown
        self._log = log
        self._pin = pin
        self._in_service = in_service

    def replace(self, worker: WorkerHandle) -> None:
        """Put a spare into the place of a worker that has failed, if one is ready. It enters the
        table in the publication in which the worker leaves it: that of this turn of the loop."""
        if self._shutdown.has_begun or not worker.service.spares:
            return
        spare = spare_for(worker, self._workers)
        if spare is not None:
            self._exchange(spare, worker)

    def replace_failed(self) -> None:
        """A spare may be ready: put it into the place of a worker that failed before."""
        for worker in filter(has_failed, self._workers):
            self.replace(worker)

    def give_spec(self, worker: WorkerHandle, spec: WorkerSpec) -> None:
        """Give a held worker this spec, which is that of the worker that it replaces: a spare may
        have taken the place of that one since the held one was started."""
        if worker.spec != spec:
            if worker.change_spec(spec):
                self._pin([worker])
            self._entries.save_soon(worker)

    def _exchange(self, spare: WorkerHandle, worker: WorkerHandle) -> None:
        spare.spec, worker.spec = worker.spec, spare.spec
        self._selection.publish_soon_or_now()
        for each in (spare, worker):
            if each.process and not each.process.has_ended:
                self._entries.save_soon(each)
        if spare.spec.cpus != worker.spec.cpus:
            self._pin((spare, worker))
        self._log.info("worker %d took the place of worker %d", spare.slot, worker.slot)
        self._in_service()
