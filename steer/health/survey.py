"""The state of all sockets of workers, read together: whether each is open, connected, or bound to
a device.

A survey is taken at most once a second, and less often the more sockets there are, so that its cost
stays constant.
"""

from __future__ import annotations

from collections import deque

from steer.config.address import Bind
from steer.sockets import members
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.looks import TOGETHER_S, on_the_beat
from steer.workers.pool import WorkerPool
from steer.workers.queues import Table

LOOK_S = 1.0
PER_S = 250
"""The sockets to read in a second."""
_STEP_S = 0.005
_SUSPECTED_PER_S = 1000
"""The sockets to read in a second while a worker is odd or has changed its state."""


class Survey:
    """Takes surveys, and has the latest.

    Attributes:
        number: the number of surveys so far.
        odd: workers whose sockets are not as they should be, until a closer look clears them.
        has_changed: whether a worker's state has changed since the latest survey.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._tables: dict[Bind, Table | None] = {}
        self._usual_device: int | None = None
        self._taken_s = self._due_s = 0.0
        self._usual_ones: set[int] = set()
        self._unseen: deque[WorkerHandle] = deque()
        self.number = 0
        self.odd: set[WorkerHandle] = set()
        self.has_changed = False

    def table(self, bind: Bind) -> Table | None:
        """Sockets at an address by inode; None: not known, or not read yet."""
        return self._tables.get(bind)

    @property
    def sockets(self) -> int:
        """How many sockets there should be."""
        return len(self._pool.workers) * len(self._pool.binds)

    def is_due(self, now_s: float) -> bool:
        """The more seldom the more sockets there are, as it takes the longer."""
        urgent_s = max(LOOK_S, self.sockets / _SUSPECTED_PER_S) - TOGETHER_S
        is_urgent = self.has_changed or self.odd
        if now_s < self._due_s and not (is_urgent and now_s >= self._taken_s + urgent_s):
            return False
        again_s = max(LOOK_S, self.sockets / PER_S)
        self._taken_s, self._due_s = now_s, on_the_beat(now_s, again_s) - TOGETHER_S
        return True

    def take(self, is_counted: bool) -> bool:
        """Ask the kernel how all sockets stand; whether something may have come that was not
        counted. `compare` is to follow."""
        binds = self._pool.binds
        before, self._tables = self._tables, {bind: self._pool.queues.at(bind) for bind in binds}
        self.number += 1
        self._usual_device = None
        is_untold = None in self._tables.values()
        is_same = all(self._tables[bind] is before.get(bind) for bind in binds)
        if is_same and not self.has_changed and not self._unseen:
            return is_untold
        self.has_changed = False
        self._usual_ones, self._unseen = self._usual(), deque(self._pool.workers)
        return is_untold or not (is_counted or self._are_all_empty())

    def _are_all_empty(self) -> bool:
        return not any(
            row.queued for table in self._tables.values() for row in (table or {}).values()
        )

    def compare(self) -> list[WorkerHandle]:
        """The workers that have become odd, as far as there is time to look. Going through a
        thousand takes 20 ms while workers are forked, as every page that is written to, even for a
        reference count, is copied then."""
        found = []
        end_s = self._pool.clock.read_s() + _STEP_S
        while self._unseen:
            worker = self._unseen.popleft()
            process = worker.process
            is_usual = not process or process.inodes <= self._usual_ones
            if not is_usual and worker not in self.odd and self._is_odd(worker):
                found.append(worker)
            if self._pool.clock.read_s() >= end_s:
                break
        self.odd.update(found)
        return found

    @property
    def is_compared(self) -> bool:
        """Whether `compare` has seen all workers."""
        return not self._unseen

    def _usual(self) -> set[int]:
        """Sockets that nothing is odd about, by inode. That is most of them, and of workers with
        no other no more need be seen: with a thousand that would take 20 ms."""
        return {
            inode
            for table in self._tables.values()
            for inode, row in (table or {}).items()
            if not (row.is_connected or row.device)
        }

    def _is_odd(self, worker: WorkerHandle) -> bool:
        """Whether its sockets do not stand as they should, as far as a survey tells."""
        process = worker.process
        # One that ends may close its sockets when it likes.
        if process is None or worker.state in (State.STARTING, State.STOPPING):
            return False
        return any(
            (table := self._tables.get(bind)) is not None and self._stands_otherwise(table, inode)
            for bind, inode in zip(process.launch.binds, process.bound, strict=False)
        )

    def _stands_otherwise(self, table: Table, inode: int) -> bool:
        here = table.get(inode)
        return here is None or here.is_connected or self.is_unusual(here.device)

    def is_unusual(self, device: int) -> bool:
        """Whether a socket that is bound to this device is bound as new ones are not."""
        if not device:
            return False
        if self._usual_device is None:
            self._usual_device = members.usual_device()
        return device != self._usual_device
