"""A worker as the guard stores it, for a controller that adopts it."""

from __future__ import annotations

import msgspec

from steer.config.plan import Generation, WorkerSpec
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.process import Running


class StoredWorker(msgspec.Struct, frozen=True):
    """A worker with a process. The names are a format: another version may read them.

    Args:
        held: until `change` was admitted, if that has happened since.
    """

    running: Running
    spec: WorkerSpec
    slot: int
    generation: int
    state: str
    held: bool
    ready_s: float | None
    starts: int
    failures: int
    says_ready: bool
    others: set[int]
    takers: frozenset[int]
    hung: bool
    acceptors: frozenset[int] = frozenset()
    is_apart: bool = False
    change: int = 1


def stored(worker: WorkerHandle, running: Running) -> StoredWorker:
    """The worker with its process."""
    return StoredWorker(
        running,
        worker.spec,
        worker.slot,
        worker.generation.number,
        worker.state.value,
        worker.held,
        worker.ready_s,
        worker.starts,
        worker.failures,
        worker.says_ready,
        worker.others,
        worker.takers,
        worker.hung,
        worker.acceptors,
        worker.is_apart,
        worker.change,
    )


def restored(
    saved: StoredWorker, generation: Generation, heard_s: float, admitted: int
) -> WorkerHandle:
    """The worker without its process.

    Args:
        generation: that of the number stored.
        admitted: see `WorkerPool`.
    """
    return WorkerHandle(
        saved.spec,
        saved.slot,
        generation,
        State(saved.state),
        held=saved.held and saved.change > admitted,
        change=saved.change,
        ready_s=saved.ready_s,
        starts=saved.starts,
        failures=saved.failures,
        says_ready=saved.says_ready,
        heard_s=heard_s,
        takers=saved.takers,
        acceptors=saved.acceptors,
        hung=saved.hung,
        others=saved.others,
        is_apart=saved.is_apart,
    )
