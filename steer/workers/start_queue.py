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
        places: all workers there are.

    Attributes:
        is_of_new_service: the service starts; else one that was adopted is filled up.
    """

    def __init__(self, places: Collection[WorkerHandle]) -> None:
        self.is_of_new_service = False
        self._places = places
        self._waiting: deque[WorkerHandle] = deque()
        self._starting: dict[WorkerHandle, None] = {}
        self._most_starting = _NO_LIMIT

    def add(self, place: WorkerHandle) -> None:
        """As the last."""
        place.state = State.BACKOFF
        self._waiting.append(place)

    def clear(self) -> None:
        """None of these is to be started any more."""
        self._waiting.clear()

    def limit(self, most_starting: int) -> None:
        """From now on so many may be starting at once."""
        self._most_starting = most_starting

    def lift_limit(self) -> None:
        """From now on any number may."""
        self._most_starting = _NO_LIMIT

    @property
    def is_limited(self) -> bool:
        """Whether some wait, and not all may be starting at once."""
        return bool(self._waiting) and self._most_starting < len(self._places)

    def began(self, places: Iterable[WorkerHandle]) -> None:
        """These have a process now."""
        if self.is_limited:
            self._starting |= dict.fromkeys(places)

    def next(self, at_most: int) -> Sequence[WorkerHandle]:
        """Take the next of those that are still wanted, as far as the limit allows."""
        few: list[WorkerHandle] = []
        if self.is_limited:
            # Looked for among all workers, they would take longer the more workers wait.
            self._starting = dict.fromkeys(filter(_is_starting, self._starting))
            at_most = min(at_most, self._most_starting - len(self._starting))
        while self._waiting and len(few) < at_most:
            place = self._waiting.popleft()
            if place.state is State.BACKOFF:
                place.state, _ = lifecycle.step(place.state, Event.RETRY)
                few.append(place)
        return few


def _is_starting(place: WorkerHandle) -> bool:
    return place.process is not None and place.state is State.STARTING
