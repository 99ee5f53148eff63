"""Checking that each group still has steer's program, and attaching it again.

Any member can attach another program to the whole group, or detach steer's, and some servers do.
`membership.Bypass` decides what follows from what is seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from steer.backends.membership import Advice, Bypass
from steer.config.address import Bind
from steer.linux import processes
from steer.sockets import members
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool
from steer.workers.queues import Table

_AT_ONCE = 256
"""The most counters to read in one look, at some microseconds each."""
_BLIND_LOOKS = 5
"""Without counters, the program is attached again after so many looks."""
_RESTS = 4
"""The same while nothing comes."""
_UNSTEERED = -1
"""Stands for a slot."""

Standings = Callable[[Bind], Table | None]


class Chosen:
    """Whether the program at one address chooses anybody: told by the counters of some slots in
    each look, and while it does mostly by the first of them."""

    def __init__(self) -> None:
        self._times = self._alike = 0
        self._seen: dict[int, int] = {}
        self._round: deque[int] = deque()

    def look(
        self, slots: Iterable[int], selected: Callable[[int], int], at_most: int
    ) -> int | None:
        """Another number if it chose somebody since the last look, the same if it did not; None
        as long as that cannot be told, as not all were looked at.

        Args:
            selected: how often a slot was chosen.
        """
        for _ in range(at_most):
            if not self._round:
                self._round.extend(slots)
                self._seen = {slot: self._seen.get(slot, 0) for slot in self._round}
            if not self._round or self._alike >= len(self._seen):
                self._alike = 0
                return self._times
            slot = self._round.popleft()
            before, self._seen[slot] = self._seen[slot], selected(slot)
            self._alike += 1
            if self._seen[slot] != before:
                self._times, self._alike = self._times + 1, 0
                return self._times
        return None


class Programs:
    """Checks the programs of all groups."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._chosen: dict[int, Chosen] = {}
        self._bypasses: dict[int, Bypass] = {}
        self._drops: dict[tuple[int, int], int] = {}
        self._look = self._rested = 0
        self._somebody_is_new = False

    def changed(self, worker: WorkerHandle) -> None:
        """A worker is in another state. Servers that attach a program of their own do so when
        they start."""
        self._somebody_is_new |= worker.state is State.READY

    def look(self, standing_at: Standings) -> None:
        """Args: standing_at: how the sockets of an address stood a moment ago, by inode."""
        self._look += 1
        binds = self._pool.generation.plan.binds
        advice = {at: self._look_at(at, bind, standing_at) for at, bind in enumerate(binds)}
        advice |= dict.fromkeys(self._given_to_anchors(), Advice.TELL)
        self._attach(set(advice.values()) != {Advice.NOTHING})
        for at, each in advice.items():
            if each is Advice.TELL:
                self._tell(binds[at])

    def rest(self) -> None:
        """A program that somebody else attached meanwhile has chosen nobody yet."""
        self._rested += 1
        self._attach(self._rested % _RESTS == 0)

    def _attach(self, is_due: bool) -> None:
        if is_due or self._somebody_is_new:
            self._pool.selection.attach_again()
            self._somebody_is_new = False

    def _given_to_anchors(self) -> list[int]:
        """At which addresses an anchor was chosen, which ours never does."""
        before = self._drops
        self._drops = {
            (at, processes.socket_inode(sock.fileno())): members.drops(sock)
            for at, sock in self._pool.backend.anchors.items()
        }
        return [key[0] for key, now in self._drops.items() if now > before.get(key, now)]

    def _look_at(self, at: int, bind: Bind, standing_at: Standings) -> Advice:
        if self._pool.backend.unsteered() is None:
            return Advice.NOTHING if self._look % _BLIND_LOOKS else Advice.ATTACH
        chosen = self._chosen.setdefault(at, Chosen()).look(
            self._slots(), partial(self._selected, at), self._at_most
        )
        if chosen is None:
            return Advice.NOTHING
        waiting = self._waiting(at, bind, standing_at(bind) or {})
        return self._bypasses.setdefault(at, Bypass()).look(chosen, waiting)

    @property
    def _at_most(self) -> int:
        return 1 + _AT_ONCE // len(self._pool.generation.plan.binds)

    def _slots(self) -> Iterator[int]:
        """All that may be chosen, and one for what was left to the kernel's hash."""
        yield _UNSTEERED
        if (backup := self._pool.backend.backup) and backup.sockets:
            yield from backup.slots
        for worker in self._pool.workers:
            yield worker.slot

    def _selected(self, at: int, slot: int) -> int:
        backend = self._pool.backend
        if slot == _UNSTEERED:
            return backend.unsteered() or 0
        counts = backend.counts(slot, at)
        return counts.selected if counts else 0

    def _waiting(self, at: int, bind: Bind, standing: Table) -> Mapping[int, int]:
        """What waits at each worker's socket, by inode."""
        open_at = self._pool.backend.open
        found = {}
        for worker in self._pool.workers:
            if worker.process and at < len(worker.process.bound) and at not in worker.departures:
                inode = worker.process.bound[at]
                if bind.protocol == "tcp":
                    found[inode] = open_at(worker.slot) or 0
                else:
                    here = standing.get(inode)
                    found[inode] = here.queued if here else 0
        return found

    def _tell(self, bind: Bind) -> None:
        key = f"{bind.label} past the program"
        if key in self._pool.group_notes:
            return
        words = (
            f"what comes to {bind.label} does not go by the policy: a worker may have attached a "
            "program of its own (SO_ATTACH_REUSEPORT_CBPF, _EBPF) or detached steer's, or it is "
            "multicast, or redirected by TPROXY; steer's was attached again"
        )
        self._pool.log.warning("%s", words)
        self._pool.group_notes[key] = words
