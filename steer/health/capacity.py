"""Workers at capacity are excluded from selection while another worker has room."""

from __future__ import annotations

from collections.abc import Iterable

from steer.linux.log import Log
from steer.workers.handle import WorkerHandle
from steer.workers.migration import QueueMigration


def set_at_capacity(worker: WorkerHandle, at_capacity: bool, log: Log) -> None:
    """Note and log that a worker is at capacity, or is no longer."""
    worker.at_capacity = at_capacity
    now = "is at capacity" if at_capacity else "accepts connections again"
    log.info("worker %d %s", worker.slot, now)


def exclude(
    workers: Iterable[WorkerHandle], watched: Iterable[WorkerHandle], migration: QueueMigration
) -> None:
    """Exclude workers at capacity while another worker has room. If all are at capacity none is
    excluded: their connections could go nowhere else.

    Args:
        workers: all workers of the service.
        watched: contains all workers that are or were at capacity.
    """
    if not any(worker.at_capacity or worker.excluded for worker in watched):
        return
    in_service = [worker for worker in workers if worker.is_in_service]
    some_have_room = any(not worker.at_capacity and not worker.queued for worker in in_service)
    all_at_capacity = all(worker.at_capacity for worker in in_service)
    for worker in in_service:
        if worker.at_capacity and not worker.excluded and some_have_room:
            migration.exclude(worker)
        elif worker.excluded and (all_at_capacity or not worker.at_capacity):
            migration.include(worker)
        elif worker.excluded and worker.queued:
            migration.migrate(worker)
