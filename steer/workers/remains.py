"""What a worker that has left the table still has: a queue, flows, connections.

What was selected before the table changed may still be on its way into the worker's accept
queue, in it, or accepted with its request not yet read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from steer.errors import KernelError
from steer.linux import processes
from steer.linux.retry import Retry
from steer.workers.clock import Clock
from steer.workers.handle import WorkerHandle
from steer.workers.migration import QueueMigration
from steer.workers.process import WorkerProcess
from steer.workers.queues import Queues
from steer.workers.selection import Selection

LOOK_S = 0.01
"""Between looks at one worker."""
LOOK_AGAIN_S = 0.1
"""Between later looks, as most handshakes end soon and hundreds may take long to finish."""
TAKE_S = 0.1
"""So long a worker may take itself what waits for it, before that is migrated."""
_UNSEEN_S = 1.0
"""So long a worker may take to take what waits for it, where that cannot be seen."""
_LOOK_AT_FLOWS_S = 0.25


class Remains:
    """Looks at them. Each wait is a generator of seconds: it goes on after so many."""

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
        """Until nothing waits for the worker. What can be migrated is not waited for long.

        Args:
            synchronized_s: as it was after that time.

        Returns:
            Whether that is so: false after `limit_s`.
        """
        began_s = self._clock.now_s()
        while worker.process and not worker.serves:
            with self._retry.spare.lent():
                queues = self._queues.of(worker.process, synchronized_s)
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

    def migrate_late(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Migrate what waits for it by now, if anything does or that cannot be seen."""
        queues = self._queues.of(process)
        if queues is None or any(each.queued for each in queues.values()):
            self._migration.migrate(worker)

    def until_forgotten(self, worker: WorkerHandle, end_s: float) -> Iterator[float]:
        """Until the flows that a policy remembers to be there are idle; then they are forgotten."""
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
        """Sent to it so far; None where nobody counts."""
        binds = worker.generation.plan.binds
        over_udp = [at for at, bind in enumerate(binds) if bind.protocol == "udp"]
        counts = [self._selection.backend.counts(worker.slot, at) for at in over_udp]
        return sum(each.selected for each in counts if each) if any(counts) else None

    def until_answered(self, worker: WorkerHandle, end_s: float) -> Iterator[float]:
        """Until it has no connections."""
        pause_s = LOOK_S
        while worker.process and self._has_connections(worker, worker.process):
            if self._clock.now_s() >= end_s:
                return
            yield pause_s
            pause_s = min(LOOK_AGAIN_S, 1.5 * pause_s)

    def _has_connections(self, worker: WorkerHandle, process: WorkerProcess) -> bool:
        """Where they are counted and there are some, its files need no look."""
        if self._selection.backend.open(worker.slot):
            return True
        try:
            return bool(processes.open_sockets(process.pid) - worker.initial_sockets)
        except KernelError:
            return True
