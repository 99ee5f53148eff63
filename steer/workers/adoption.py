"""Taking over the workers of the previous controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from steer.config.plan import Generation
from steer.guard.entry import Entry
from steer.workers.clock import Clock
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.selection import Selection
from steer.workers.spawner import Spawner
from steer.workers.stored_selection import StoredSelection
from steer.workers.stored_worker import StoredWorker, restored


class Adoption:
    """Makes workers from the guard's entries.

    Args:
        workers: receives the adopted workers.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        selection: Selection,
        spawner: Spawner,
        entries: GuardEntries,
        clock: Clock,
    ) -> None:
        self._workers = workers
        self._selection = selection
        self._spawner = spawner
        self._entries = entries
        self._clock = clock

    def adopt(
        self,
        entries: Iterable[Entry],
        selection: Entry,
        generations: Mapping[int, Generation],
        activated: int,
    ) -> None:
        """Adopt all workers.

        Args:
            entries: the guard's entries of workers. The workers take over their descriptors.
            selection: the guard's entry of the selection.
            generations: by number, the generations of the workers.
            activated: see `WorkerPool`.
        """
        left = msgspec.json.decode(selection.value, type=StoredSelection)
        held: dict[int, Sequence[int]] = {}
        for entry in entries:
            worker = self._adopt_one(entry, generations, activated)
            self._workers.add(worker)
            held[worker.slot] = entry.fds[3:]
        self._selection.restore(left, selection.fds, held)
        for worker in self._workers:
            self._entries.save_one(worker)
        self._selection.save()
        self._workers.sort(key=lambda worker: (worker.generation.number, worker.spec.number))

    def _adopt_one(
        self, entry: Entry, generations: Mapping[int, Generation], activated: int
    ) -> WorkerHandle:
        saved = msgspec.json.decode(entry.value, type=StoredWorker)
        generation, now_s = generations[saved.generation], self._clock.now_s()
        worker = restored(saved, generation, now_s, activated)
        self._spawner.adopt(worker, saved.running, entry)
        return worker


def staying(workers: Iterable[WorkerHandle], generation: Generation) -> Mapping[int, WorkerHandle]:
    """The workers of this generation that stay, by the number of their spec. Pure."""
    by_number: dict[int, WorkerHandle] = {}
    numbers = {spec.number for spec in generation.plan.all_specs}
    for worker in workers:
        # If two workers have one spec the later stays, as it was to replace the earlier.
        is_better = worker.process or worker.spec.number not in by_number
        if is_better and worker.spec.number in numbers and _belongs(worker, generation):
            by_number[worker.spec.number] = worker
    return by_number


def _belongs(worker: WorkerHandle, generation: Generation) -> bool:
    """Whether it is of the generation, and is neither held nor retiring."""
    comes_or_goes = worker.held or worker.is_retiring
    return worker.generation.number == generation.number and not comes_or_goes
