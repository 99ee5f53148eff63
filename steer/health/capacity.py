"""Workers at capacity: they get nothing new while another has room."""

from __future__ import annotations

from collections.abc import Iterable

from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool


def set_full(pool: WorkerPool, worker: WorkerHandle, is_full: bool) -> None:
    worker.full = is_full
    pool.log.info(
        "worker %d %s", worker.slot, "is at capacity" if is_full else "takes connections again"
    )


def shed(pool: WorkerPool, watched: Iterable[WorkerHandle]) -> None:
    """Those who are at capacity get nothing new while another has room. When nobody has,
    nothing is done: what waits may as well wait there.

    Args:
        watched: has all that are at capacity, or were.
    """
    if not any(worker.full or worker.shed for worker in watched):
        return
    there = [worker for worker in pool.workers if worker.is_in_service]
    some_have_room = any(not worker.full and not worker.queued for worker in there)
    all_are_full = all(worker.full for worker in there)
    for worker in there:
        if worker.full and not worker.shed and some_have_room:
            pool.migration.shed(worker, True)
        elif worker.shed and (all_are_full or not worker.full):
            pool.migration.shed(worker, False)
        elif worker.shed and worker.queued:
            pool.migration.migrate(worker)
