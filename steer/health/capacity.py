"""Workers at capacity: they get nothing new while another has room."""

from __future__ import annotations

from collections.abc import Iterable

from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool


def set_at_capacity(pool: WorkerPool, worker: WorkerHandle, is_full: bool) -> None:
    worker.at_capacity = is_full
    pool.log.info(
        "worker %d %s", worker.slot, "is at capacity" if is_full else "takes connections again"
    )


def excluded(pool: WorkerPool, watched: Iterable[WorkerHandle]) -> None:
    """Those who are at capacity get nothing new while another has room. When nobody has,
    nothing is done: what waits may as well wait there.

    Args:
        watched: has all that are at capacity, or were.
    """
    if not any(worker.at_capacity or worker.excluded for worker in watched):
        return
    there = [worker for worker in pool.workers if worker.is_in_service]
    some_have_room = any(not worker.at_capacity and not worker.queued for worker in there)
    all_are_full = all(worker.at_capacity for worker in there)
    for worker in there:
        if worker.at_capacity and not worker.excluded and some_have_room:
            pool.migration.excluded(worker, True)
        elif worker.excluded and (all_are_full or not worker.at_capacity):
            pool.migration.excluded(worker, False)
        elif worker.excluded and worker.queued:
            pool.migration.migrate(worker)
