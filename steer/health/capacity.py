"""Workers at capacity are excluded from selection while another worker has room."""

from __future__ import annotations

from collections.abc import Iterable

from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool


def set_at_capacity(pool: WorkerPool, worker: WorkerHandle, at_capacity: bool) -> None:
    worker.at_capacity = at_capacity
    now = "is at capacity" if at_capacity else "accepts connections again"
    pool.log.info("worker %d %s", worker.slot, now)


def exclude(pool: WorkerPool, watched: Iterable[WorkerHandle]) -> None:
    """Exclude workers at capacity while another worker has room. If all are at capacity none is
    excluded: their connections could go nowhere else.

    Args:
        watched: contains all workers that are or were at capacity.
    """
    if not any(worker.at_capacity or worker.excluded for worker in watched):
        return
    in_service = [worker for worker in pool.workers if worker.is_in_service]
    some_have_room = any(not worker.at_capacity and not worker.queued for worker in in_service)
    all_at_capacity = all(worker.at_capacity for worker in in_service)
    for worker in in_service:
        if worker.at_capacity and not worker.excluded and some_have_room:
            pool.migration.exclude(worker)
        elif worker.excluded and (all_at_capacity or not worker.at_capacity):
            pool.migration.include(worker)
        elif worker.excluded and worker.queued:
            pool.migration.migrate(worker)
