"""Removing sockets of ended workers from their groups, even if other processes have them open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from steer.linux import fork
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.sockets import leaked
from steer.workers.ends import End
from steer.workers.handle import WorkerHandle
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown

LEAKS_NAMED = 4
"""At most this number of processes that still have a socket of an ended worker are logged by
name."""


class SocketRemoval:
    """Makes sure that no socket of an ended worker is selected."""

    def __init__(self, selection: Selection, shutdown: Shutdown, log: Log, retry: Retry) -> None:
        self._selection = selection
        self._shutdown = shutdown
        self._log = log
        self._retry = retry

    def remove(self, worker: WorkerHandle) -> bool:
        """Take the sockets of one worker out of its groups; whether all of them are out.

        A worker that was forked a moment ago may still have copies, with which the sockets would
        stay. On backends where the order in a group matters, they have to leave now.
        """
        fork.await_descriptors_closed()
        return self._retry.attempt(
            _act(worker), partial(self._selection.remove_sockets, worker.slot)
        )

    def remove_all(self, ends: Iterable[tuple[End, Sequence[int]]]) -> None:
        """Take the sockets of several workers out of their groups, and shut down those that other
        processes have open.

        Args:
            ends: with the processes that are left of each worker.
        """
        # Else workers that start would be found to have these sockets open.
        fork.await_descriptors_closed()
        snapshot, nobody = leaked.Snapshot(), list[leaked.LeakedSocket]()
        ends = list(ends)
        serving = [end.worker.slot for end, _ in ends if end.worker.serves]
        if serving and not self._shutdown.has_begun:
            self._selection.exclude_ended(serving)
        for end, left in ends:
            worker, find = end.worker, partial(self._leaked, end, left, snapshot)
            found = self._retry.result(_act(worker), find, nobody) if end.process.bound else nobody
            if not self.remove(worker):
                self._selection.publisher.soon()  # which removes them as well
            if found:
                self._retry.attempt(_act(worker), partial(self._cut_off, worker, found))

    def _leaked(
        self, end: End, left: Sequence[int], snapshot: leaked.Snapshot
    ) -> list[leaked.LeakedSocket]:
        """The sockets of an ended worker that other processes still have open. If the backend holds
        a duplicate, all processes need not be searched, as the duplicate is shut down anyway."""
        worker, bound = end.worker, end.process.bound
        is_held = bool(self._selection.backend.held(worker.slot))
        everywhere = not self._shutdown.has_begun and not is_held
        everywhere = everywhere and (end.is_lost or self._may_be_open(worker))
        return leaked.find(worker.binds, bound, left, everywhere, snapshot)

    def _may_be_open(self, worker: WorkerHandle) -> bool:
        """Whether a process may have the worker's sockets open. If all sockets have left their
        groups, no process has. Asking for that is quicker than reading all sockets of a port."""
        is_member, binds = self._selection.backend.is_member, worker.binds
        is_in_a_group = (is_member(worker.slot, at) is not False for at in range(len(binds)))
        return bool(worker.departures) or any(is_in_a_group)

    def _cut_off(self, worker: WorkerHandle, found: Sequence[leaked.LeakedSocket]) -> None:
        refusals = list(leaked.shut_down(found))
        for leak, refusal in refusals[:LEAKS_NAMED]:
            then = f": {refusal}" if refusal else ", and is cut off from it"
            self._log.warning("worker %d has ended, but %s%s", worker.slot, leak, then)
        if len(refusals) > LEAKS_NAMED:
            more = len(refusals) - LEAKS_NAMED
            self._log.warning(
                "worker %d has ended, and %d more have a socket of it", worker.slot, more
            )


def _act(worker: WorkerHandle) -> str:
    return f"take worker {worker.slot} out"
