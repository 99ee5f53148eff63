"""Going on with workers that another controller left."""

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
from steer.workers.stored_selection import SavedSelection
from steer.workers.stored_worker import StoredWorker, restored


class Adoption:
    """Makes workers of what the guard knows of them.

    Args:
        places: adopted workers are added to these.
    """

    def __init__(
        self,
        places: WorkerHandles,
        selection: Selection,
        spawner: Spawner,
        entries: GuardEntries,
        clock: Clock,
    ) -> None:
        self._places = places
        self._selection = selection
        self._spawner = spawner
        self._entries = entries
        self._clock = clock

    def adopt(
        self,
        entries: Iterable[Entry],
        steering: Entry,
        generations: Mapping[int, Generation],
        admitted: int,
    ) -> None:
        """Adopt all workers.

        Args:
            entries: the guard's, of the workers; their descriptors become ours.
            steering: the guard's, of the backend.
            generations: by number, those that workers may be of.
            admitted: see `WorkerPool`.
        """
        left = msgspec.json.decode(steering.value, type=SavedSelection)
        held: dict[int, Sequence[int]] = {}
        for entry in entries:
            place = self._adopt_one(entry, generations, admitted)
            self._places.add(place)
            held[place.slot] = entry.fds[3:]
        self._selection.restore(left, steering.fds, held)
        for place in self._places:
            self._entries.save_one(place)
        self._selection.keep()
        self._places.sort(key=lambda place: (place.generation.number, place.seat.number))

    def _adopt_one(
        self, entry: Entry, generations: Mapping[int, Generation], admitted: int
    ) -> WorkerHandle:
        saved = msgspec.json.decode(entry.value, type=StoredWorker)
        generation, now_s = generations[saved.generation], self._clock.now_s()
        place = restored(saved, generation, now_s, admitted)
        self._spawner.adopt(place, saved.running, entry)
        return place


def seated(places: Iterable[WorkerHandle], generation: Generation) -> Mapping[int, WorkerHandle]:
    """By seat of this generation, the worker that is to stay there. Pure."""
    there: dict[int, WorkerHandle] = {}
    for place in places:
        # Of two on a seat the later one: the earlier was to be replaced by it.
        is_better = place.process or place.seat.number not in there
        if is_better and _belongs(place, generation):
            there[place.seat.number] = place
    return there


def _belongs(place: WorkerHandle, generation: Generation) -> bool:
    """Whether it is of the generation, and neither comes with a change nor goes."""
    there_is_such_a_seat = place.seat.number < len(generation.plan.seats)
    comes_or_goes = place.held or place.is_on_its_way_out
    is_of_it = place.generation.number == generation.number
    return is_of_it and there_is_such_a_seat and not comes_or_goes
