"""Starting a process for each of several workers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from steer.child.launch import Launch
from steer.guard.client import GuardClient
from steer.guard.entry import Entry
from steer.linux import family
from steer.sockets import port_checks, reuseport
from steer.workers import process as worker_process
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.process import Running, TemplateLost, WorkerProcess
from steer.workers.selection import Selection


class Spawner:
    """Binds sockets for workers and forks their processes.

    Args:
        workers: all workers of the pool.
        launch: returns the instructions for a worker.

    Attributes:
        fork_workers: forks the processes.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        selection: Selection,
        guard: GuardClient,
        entries: GuardEntries,
        launch: Callable[[WorkerHandle], Launch],
    ) -> None:
        self._workers = workers
        self._selection = selection
        self._guard = guard
        self._entries = entries
        self._launch = launch
        self.fork_workers = worker_process.fork_from_nothing

    def spawn(self, workers: Sequence[WorkerHandle]) -> Sequence[WorkerProcess]:
        """Start a process for each worker.

        The forks follow one another directly: a page that is written to in between is copied
        once more for each child (fork(2), copy on write).

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
                    # Before the fork, as the process may end at once and shut its listeners down.
                    self._selection.add_sockets(worker.slot, reuseport.duplicates(own))
                    owned.append(own)
            started = self._fork(launches, owned)
        for worker, process in zip(workers, started, strict=True):
            self._give(worker, process)
        worker_process.begin_all(started, self._guard)
        self._entries.save(workers, look=False)
        return started

    def _fork(
        self, launches: Sequence[Launch], owned: Sequence[Sequence[socket.socket]]
    ) -> Sequence[WorkerProcess]:
        try:
            return worker_process.fork_all(launches, self._guard, owned, self.fork_workers)
        except TemplateLost:
            # With other channels: what the template process may have forked has these, and exits
            # when they close.
            nothing = worker_process.fork_from_nothing
            return worker_process.fork_all(launches, self._guard, owned, nothing)

    def adopt(self, worker: WorkerHandle, saved: Running, entry: Entry) -> None:
        """Give the worker the process that another controller started, unless that has ended."""
        process = WorkerProcess.adopted(self._launch(worker), self._guard, saved, entry)
        if process is not None:
            self._give(worker, process)

    def _give(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        worker.process = process
        self._workers.by_pid[process.pid] = worker

    def kill_all(self) -> None:
        """Kill all processes of all workers, whatever state they are in."""
        with suppress(OSError):  # each of them is killed below
            family.kill([worker.process.family for worker in self._workers if worker.process])
        for worker in self._workers:
            self.kill(worker)

    def kill(self, worker: WorkerHandle) -> None:
        """Kill the worker's processes, if there are any, and release what belongs to them."""
        if worker.process is not None:
            self._workers.by_pid.pop(worker.process.pid, None)
            worker.process.end()
            worker.process = None

    def _check_free(self, launch: Launch) -> None:
        """Check that no other program has bound the ports, unless a socket of the service holds
        them.

        Raises:
            BindError: another program has bound one.
        """
        backend = self._selection.backend
        backup = backend.backup
        if (backup and backup.sockets) or any(each.process for each in self._workers):
            return
        for index, bind in enumerate(launch.binds):
            if index not in backend.anchors:
                port_checks.check_free(bind, launch.service.settings)
