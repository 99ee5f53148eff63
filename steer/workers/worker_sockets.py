"""Sockets of workers, borrowed for a moment to reach their groups."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from steer.errors import KernelError
from steer.sockets import group_program
from steer.workers.handle import WorkerHandle

Sockets = Mapping[int, socket.socket]
"""A worker's sockets, by the number of the bind."""


class WorkerSockets:
    """Lends sockets of workers. Args: workers: all workers of the pool."""

    def __init__(self, workers: Collection[WorkerHandle]) -> None:
        self._workers = workers

    @property
    def inodes(self) -> frozenset[int]:
        owned = (worker.process.inodes for worker in self._workers if worker.process)
        return frozenset[int]().union(*owned)

    @contextmanager
    def all(self) -> Iterator[Mapping[int, Sockets]]:
        """The sockets of every worker, by slot. Raises KernelError."""
        with ExitStack() as lent:
            yield {
                worker.slot: lent.enter_context(worker.process.sockets())
                for worker in self._workers
                if worker.process
            }

    @contextmanager
    def usable(self) -> Iterator[Sockets]:
        """One socket for each bind through which a program can be attached to the group.

        Sockets of workers that serve are preferred. A socket that is out of its group, or locked
        (`group_program.Locked`), is lent only if there is no other.

        Raises:
            KernelError: the sockets may not be borrowed.
        """
        by_use = sorted(
            self._workers, key=lambda worker: (bool(worker.departures), not worker.serves)
        )
        found: Sockets = {}
        locked: Sockets = {}
        with ExitStack() as lent:
            for process in [worker.process for worker in by_use if worker.process]:
                if len(found) < len(process.bound):
                    borrowed = lent.enter_context(process.sockets())
                    free = {at: each for at, each in borrowed.items() if not _is_locked(each)}
                    found, locked = {**free, **found}, {**borrowed, **locked}
            yield {**locked, **found}

    @contextmanager
    def naming_locked(self) -> Iterator[None]:
        """Have `group_program.Locked` name the workers whose sockets are locked."""
        try:
            yield
        except group_program.Locked as error:
            raise group_program.locked(error.what, self._locked_slots()) from None

    def _locked_slots(self) -> Sequence[int]:
        """The slots of the groups to which no program can be attached, as all members are locked;
        none if the sockets cannot be borrowed."""
        try:
            with self.all() as sockets:
                at = {index for socks in sockets.values() for index in socks}
                groups = [
                    {slot: socks[index] for slot, socks in sockets.items() if index in socks}
                    for index in at
                ]
                locked = [group for group in groups if all(map(_is_locked, group.values()))]
                return sorted({slot for group in locked for slot in group})
        except KernelError:
            return ()


def _is_locked(sock: socket.socket) -> bool:
    return group_program.is_locked(sock.fileno())
