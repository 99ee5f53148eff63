"""What a worker still has after it has left the table: a queue, flows, connections.

A connection that was selected before may still be on its way into the worker's accept queue, be
queued there, or be accepted with its request not yet read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping

from steer.errors import KernelError
from steer.linux import processes
from steer.linux.retry import Retry
from steer.sockets.listeners import Waiting
from steer.workers import own_listeners
from steer.workers.clock import Clock
from steer.workers.handle import WorkerHandle
from steer.workers.migration import QueueMigration
from steer.workers.process import WorkerProcess
from steer.workers.queues import Queues
from steer.workers.selection import Selection

LOOK_S = 0.01
"""Between looks at one worker."""
LOOK_AGAIN_S = 0.1
"""Between later looks, as hundreds of workers may take long to finish."""
TAKE_S = 0.1
"""The time for a worker to accept its queue itself before the queue is migrated."""
_UNSEEN_S = 1.0
"""The time for a worker to accept its queue if that cannot be seen."""
_SETTLED_S = 0.03
"""The time for programs that still read the former table of listeners that a server opened itself,
and for handshakes that are under way. The publications of the pool do not tell of that table."""
_LOOK_AT_FLOWS_S = 0.25


class Remains:
    """Waits for them. Each wait is a generator that yields the seconds until its next look."""

    def __init__(
        self,
        selection: Selection,
        queues: Queues,
        migration: QueueMigration,
        clock: Clock,
        retry: Retry,
    ) -> None:
        self._selection = selection
        self._queues = queues
        self._migration = migration
        self._clock = clock
        self._retry = retry

    def until_queue_is_empty(
        self, worker: WorkerHandle, limit_s: float, synchronized_s: float
    ) -> Generator[float, None, bool]:
        """Wait until the worker's queue is empty, and migrate what it does not accept soon.

        Args:
            synchronized_s: queues that were read before this time do not count.

        Returns:
            Whether the queue is empty; false after `limit_s`.
        """
        began_s = self._clock.now_s()
        if worker.process and worker.process.launch.service.adopts:
            yield _SETTLED_S
        while worker.process and not worker.serves:
            with self._retry.spare.lent():
                queues = self._queues_of(worker.process, synchronized_s)
            waited_s = self._clock.now_s() - began_s
            if queues is None and waited_s > _UNSEEN_S:
                return True
            if queues is not None and not any(each.queued for each in queues.values()):
                return True
            if waited_s > limit_s:
                return False
            if waited_s > TAKE_S:
                self._migration.migrate(worker)
            yield LOOK_S
        return True

    def _queues_of(
        self, process: WorkerProcess, synchronized_s: float
    ) -> Mapping[int, Waiting] | None:
        if not process.launch.service.adopts:
            return self._queues.of(process, synchronized_s)
        try:
            return own_listeners.queues(process)
        except KernelError:
            return None

    def migrate_late(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Migrate the queue if it is not empty, or cannot be seen."""
        queues = self._queues.of(process)
        if queues is None or any(each.queued for each in queues.values()):
            self._migration.migrate(worker)

    def until_forgotten(self, worker: WorkerHandle, end_s: float) -> Iterator[float]:
        """Wait until the flows that a policy remembers there are idle, then forget them."""
        backend = self._selection.backend
        forget_flows = backend.forget_flows
        if worker.was_hung or forget_flows is None:
            return
        got = self._datagrams(worker)
        if not got:
            return
        idle_s, last_s = backend.policy_values().params.get("idle", 0), self._clock.now_s()
        while worker.process and (now_s := self._clock.now_s()) < min(end_s, last_s + idle_s):
            yield min(_LOOK_AT_FLOWS_S, end_s - now_s)
            if (now := self._datagrams(worker)) != got:
                got, last_s = now, now_s
        forget_flows(worker.slot)

    def _datagrams(self, worker: WorkerHandle) -> int | None:
        """The datagrams sent to the worker so far; None if they are not counted."""
        binds = worker.binds
        over_udp = [at for at, bind in enumerate(binds) if bind.protocol == "udp"]
        counts = [self._selection.backend.counts(worker.slot, at) for at in over_udp]
        return sum(each.selected for each in counts if each) if any(counts) else None

    def until_answered(self, worker: WorkerHandle, end_s: float) -> Iterator[float]:
        """Wait until the worker has no connections."""
        pause_s = LOOK_S
        while worker.process and self._has_connections(worker, worker.process):
            if self._clock.now_s() >= end_s:
                return
            yield pause_s
            pause_s = min(LOOK_AGAIN_S, 1.5 * pause_s)

    def _has_connections(self, worker: WorkerHandle, process: WorkerProcess) -> bool:
        """Whether it has connections, by their count or else by its open files."""
        if self._selection.backend.open(worker.slot):
            return True
        try:
            return bool(processes.open_sockets(process.pid) - worker.initial_sockets)
        except KernelError:
            return True
