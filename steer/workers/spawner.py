"""Starting a process for each of several workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping, Sequence
from contextlib import ExitStack, suppress

from steer.child.launch import Launch
from steer.guard.client import GuardClient
from steer.guard.entry import Entry
from steer.linux import family
from steer.sockets import reuseport
from steer.workers import process as worker_process
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle
from steer.workers.process import Running, WorkerProcess
from steer.workers.selection import Selection


class Spawner:
    """Binds sockets for workers and forks their processes.

    Args:
        workers: all workers there are.
        by_pid: see `WorkerPool`; who is started is added to it.
        launch: makes a worker's instructions.
    """

    def __init__(
        self,
        workers: Collection[WorkerHandle],
        by_pid: MutableMapping[int, WorkerHandle],
        selection: Selection,
        guard: GuardClient,
        entries: GuardEntries,
        launch: Callable[[WorkerHandle], Launch],
    ) -> None:
        self._workers = workers
        self._by_pid = by_pid
        self._selection = selection
        self._guard = guard
        self._entries = entries
        self._launch = launch

    def spawn(self, workers: Sequence[WorkerHandle]) -> Sequence[WorkerProcess]:
        """Start a process for each.

        One fork comes right after the other: a page that is written to in between is copied for
        each child once more (fork(2), copy on write).

        Raises:
            BindError, KernelError: some of the processes may have been started.
        """
        launches = [self._launch(worker) for worker in workers]
        self._check_free(launches[0])
        with ExitStack() as stack:
            owned = []
            with self._selection.together():
                for worker, launch in zip(workers, launches, strict=True):
                    worker.starts += 1
                    own = stack.enter_context(worker_process.bound(launch))
                    # Before the fork: it may end at once, and shut its listeners down.
                    self._selection.joined(worker.slot, reuseport.duplicates(own))
                    owned.append(own)
            started = worker_process.fork_all(launches, self._guard, owned)
        for worker, process in zip(workers, started, strict=True):
            self._give(worker, process)
        worker_process.begin_all(started, self._guard)
        self._entries.save(workers, look=False)
        return started

    def adopt(self, worker: WorkerHandle, saved: Running, entry: Entry) -> None:
        """Give the worker the process that it had under another controller, unless that has
        ended."""
        process = WorkerProcess.adopted(self._launch(worker), self._guard, saved, entry)
        if process is not None:
            self._give(worker, process)

    def _give(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        worker.process = process
        self._by_pid[process.pid] = worker

    def kill_all(self) -> None:
        """Leave no process of a worker, whatever happened."""
        with suppress(OSError):  # each of them is killed below
            family.kill([worker.process.family for worker in self._workers if worker.process])
        for worker in self._workers:
            self.kill(worker)

    def kill(self, worker: WorkerHandle) -> None:
        """Kill the worker's process, if it has one, and let go of it."""
        if worker.process is not None:
            self._by_pid.pop(worker.process.pid, None)
            worker.process.end()
            worker.process = None

    def _check_free(self, launch: Launch) -> None:
        """Where no socket of ours keeps the ports, somebody else may have bound them. Raises
        BindError."""
        backend = self._selection.backend
        backup = backend.backup
        if (backup and backup.sockets) or any(each.process for each in self._workers):
            return
        for index, bind in enumerate(launch.binds):
            if index not in backend.anchors:
                reuseport.check_free(bind, launch.service.settings)
