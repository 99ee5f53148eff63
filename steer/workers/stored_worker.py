"""A worker as the guard stores it, for a controller that adopts it."""

from __future__ import annotations

import msgspec

from steer.config.plan import Generation, WorkerSpec
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.process import Running


class StoredWorker(msgspec.Struct, frozen=True):
    """A worker with a process. The names are a stored format, which another version may read.

    Args:
        held: whether it waits for the activation of `change`, which may have come since.
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
    initial_sockets: set[int]
    accepting_pids: frozenset[int]
    was_hung: bool
    accepting_tids: frozenset[int] = frozenset()
    is_apart: bool = False
    change: int = 1


def stored(worker: WorkerHandle, running: Running) -> StoredWorker:
    """What to store of the worker."""
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
        worker.initial_sockets,
        worker.accepting_pids,
        worker.was_hung,
        worker.accepting_tids,
        worker.is_apart,
        worker.change,
    )


def restored(
    saved: StoredWorker, generation: Generation, heartbeat_s: float, activated: int
) -> WorkerHandle:
    """The worker that was stored, without its process.

    Args:
        generation: the generation with the stored number.
        activated: see `WorkerPool`.
    """
    return WorkerHandle(
        saved.spec,
        saved.slot,
        generation,
        State(saved.state),
        held=saved.held and saved.change > activated,
        change=saved.change,
        ready_s=saved.ready_s,
        starts=saved.starts,
        failures=saved.failures,
        says_ready=saved.says_ready,
        heartbeat_s=heartbeat_s,
        accepting_pids=saved.accepting_pids,
        accepting_tids=saved.accepting_tids,
        was_hung=saved.was_hung,
        initial_sockets=saved.initial_sockets,
        is_apart=saved.is_apart,
    )
