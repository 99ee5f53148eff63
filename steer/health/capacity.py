"""Workers at capacity: they get nothing new while another has room."""

from __future__ import annotations

from collections.abc import Iterable

from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool


def set_full(pool: WorkerPool, place: WorkerHandle, is_full: bool) -> None:
    place.full = is_full
    pool.log.info(
        "worker %d %s", place.slot, "is at capacity" if is_full else "takes connections again"
    )


def shed(pool: WorkerPool, watched: Iterable[WorkerHandle]) -> None:
    """Those who are at capacity get nothing new while another has room. When nobody has,
    nothing is done: what waits may as well wait there.

    Args:
        watched: has all that are at capacity, or were.
    """
    if not any(place.full or place.shed for place in watched):
        return
    there = [place for place in pool.places if place.is_in_service]
    some_have_room = any(not place.full and not place.queued for place in there)
    all_are_full = all(place.full for place in there)
    for place in there:
        if place.full and not place.shed and some_have_room:
            pool.migration.shed(place, True)
        elif place.shed and (all_are_full or not place.full):
            pool.migration.shed(place, False)
        elif place.shed and place.queued:
            pool.migration.migrate(place)
