"""Migrating the accept queues of workers that are not selected."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from steer.errors import KernelError
from steer.sockets import reuseport
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Command
from steer.workers.process import WorkerProcess
from steer.workers.queues import Queues
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.visibility import BORROW, Visibility


class QueueMigration:
    """Migrates accept queues, if the kernel can do that.

    Args:
        queues: forgets what it has read when a queue was migrated.
        visibility: notes that sockets cannot be borrowed.
    """

    def __init__(
        self, selection: Selection, queues: Queues, visibility: Visibility, shutdown: Shutdown
    ) -> None:
        self._selection = selection
        self._queues = queues
        self._visibility = visibility
        self._shutdown = shutdown

    def exclude(self, worker: WorkerHandle) -> None:
        """A worker at capacity leaves the table, and its queue is migrated."""
        worker.excluded = True
        self._selection.publisher.soon()
        self._migrate_when_synchronized(worker)

    def include(self, worker: WorkerHandle) -> None:
        """An excluded worker is selected again."""
        worker.excluded = False
        self._selection.publisher.soon()

    def migrate_hung(self, worker: WorkerHandle) -> None:
        """Migrate the queue of a worker that leaves the table in this turn of the loop."""
        self._selection.forget_flows_soon(worker.slot)
        self._migrate_when_synchronized(worker)

    def _migrate_when_synchronized(self, worker: WorkerHandle) -> None:
        """Migrate once no program can select the worker any more, unless it serves again then."""
        act = f"worker {worker.slot}: {Command.MIGRATE_QUEUE.value}"
        self._selection.publisher.when_synchronized(
            act, partial(self._migrate_unless_selected, worker)
        )

    def _migrate_unless_selected(self, worker: WorkerHandle) -> None:
        if not worker.serves and not self._shutdown.has_begun:
            self.migrate(worker)

    def migrate(self, worker: WorkerHandle) -> None:
        """Migrate the queue now. The worker must not be in the table, or its connections return."""
        if worker.process:
            try:
                with self._lent(worker, worker.process) as owned:
                    self._selection.backend.migrate_queue(worker.slot, owned)
            except KernelError:
                self._visibility.refused(BORROW, worker.process)
            finally:
                self._queues.forget()

    @contextmanager
    def _lent(
        self, worker: WorkerHandle, process: WorkerProcess
    ) -> Iterator[Mapping[int, socket.socket]]:
        """Lend the worker's sockets by bind: duplicates of those that the backend holds, or else
        borrowed ones.

        Raises:
            KernelError: they may not be borrowed.
        """
        with ExitStack() as stack:
            held = self._selection.backend.held(worker.slot)
            if held:
                duplicates = map(reuseport.duplicate, held)
                yield {at: stack.enter_context(sock) for at, sock in enumerate(duplicates)}
            else:
                yield stack.enter_context(process.sockets())
