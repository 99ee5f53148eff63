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
"""The most counters to read in one look; each takes some microseconds."""
_BLIND_LOOKS = 5
"""Without counters, the program is attached again after this number of looks."""
_RESTS = 4
"""The same number while no connections come."""
_UNSTEERED = -1
"""Stands for a slot."""

Standings = Callable[[Bind], Table | None]


class SelectionCheck:
    """Finds out whether the program at one address selects any socket.

    Each look reads the counters of some slots. While the program selects, the first few mostly show
    it."""

    def __init__(self) -> None:
        self._changes = self._unchanged = 0
        self._seen: dict[int, int] = {}
        self._round: deque[int] = deque()

    def look(
        self, slots: Iterable[int], selected: Callable[[int], int], at_most: int
    ) -> int | None:
        """Read some counters.

        Returns:
            Another number than before if the program has selected a socket since; the same if it
            has not; None if that is not known yet, as not all counters were read.

        Args:
            selected: returns how often a slot was selected.
        """
        for _ in range(at_most):
            if not self._round:
                self._round.extend(slots)
                self._seen = {slot: self._seen.get(slot, 0) for slot in self._round}
            if not self._round or self._unchanged >= len(self._seen):
                self._unchanged = 0
                return self._changes
            slot = self._round.popleft()
            before, self._seen[slot] = self._seen[slot], selected(slot)
            self._unchanged += 1
            if self._seen[slot] != before:
                self._changes, self._unchanged = self._changes + 1, 0
                return self._changes
        return None


class Programs:
    """Checks the programs of all groups."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._selections: dict[int, SelectionCheck] = {}
        self._bypasses: dict[int, Bypass] = {}
        self._drops: dict[tuple[int, int], int] = {}
        self._look = self._rested = 0
        self._somebody_is_new = False

    def changed(self, worker: WorkerHandle) -> None:
        """A worker's state has changed. Servers that attach a program of their own do so when they
        start."""
        self._somebody_is_new |= worker.state is State.READY

    def look(self, standing_at: Standings) -> None:
        """Args: standing_at: returns the state of the sockets of an address, by inode."""
        self._look += 1
        binds = self._pool.binds
        advice = {at: self._look_at(at, bind, standing_at) for at, bind in enumerate(binds)}
        advice |= dict.fromkeys(self._selected_anchors(), Advice.TELL)
        self._attach(set(advice.values()) != {Advice.NOTHING})
        for at, each in advice.items():
            if each is Advice.TELL:
                self._warn(binds[at])

    def rest(self) -> None:
        """Attach the programs again now and then while no connections come: another program
        that was attached meanwhile has not selected anything yet."""
        self._rested += 1
        self._attach(self._rested % _RESTS == 0)

    def _attach(self, is_due: bool) -> None:
        if is_due or self._somebody_is_new:
            self._pool.selection.attach_again()
            self._somebody_is_new = False

    def _selected_anchors(self) -> list[int]:
        """Addresses where an anchor was selected, which steer's programs never do."""
        before = self._drops
        self._drops = {
            (at, processes.socket_inode(sock.fileno())): members.drops(sock)
            for at, sock in self._pool.backend.anchors.items()
        }
        return [key[0] for key, now in self._drops.items() if now > before.get(key, now)]

    def _look_at(self, at: int, bind: Bind, standing_at: Standings) -> Advice:
        if self._pool.backend.unsteered() is None:
            return Advice.NOTHING if self._look % _BLIND_LOOKS else Advice.ATTACH
        selections = self._selections.setdefault(at, SelectionCheck()).look(
            self._slots(), partial(self._selected, at), self._at_most
        )
        if selections is None:
            return Advice.NOTHING
        waiting = self._waiting(at, bind, standing_at(bind) or {})
        return self._bypasses.setdefault(at, Bypass()).look(selections, waiting)

    @property
    def _at_most(self) -> int:
        return 1 + _AT_ONCE // len(self._pool.binds)

    def _slots(self) -> Iterator[int]:
        """All slots that may be selected, and one for what was left to the kernel's hash."""
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
        """The length of the queue, or the open connections, of each worker's socket, by inode."""
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

    def _warn(self, bind: Bind) -> None:
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
