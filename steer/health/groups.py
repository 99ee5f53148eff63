"""When to check that workers' sockets are still in their groups.

A `survey` sees all sockets together. Some departures it cannot show (SO_REUSEPORT unset, a listener
that was shut down and listens again), but these do no harm until connections come. Then one worker
after another gets a closer look, see `repair`: at most `_MOST` sockets in a second. While nothing
comes, one worker gets a closer look now and then.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial

from steer.health.programs import Programs
from steer.health.repair import Repair
from steer.health.survey import LOOK_S, Survey
from steer.sockets import traffic
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.looks import TOGETHER_S, on_the_beat
from steer.workers.pool import WorkerPool

_MOST, _AT_ONCE = 128, 16
_LOOKING_S = 0.005
"""The time for looks in one step, however slow the machine is."""
_RESTS = 4
"""The seconds between closer looks while nothing comes. Without counters it is one second, as a
socket that left its group may get everything then."""


class Groups:
    """Takes the looks.

    Args:
        replace: requests a replacement for a worker, with new sockets.
    """

    def __init__(self, pool: WorkerPool, replace: Callable[[WorkerHandle], None]) -> None:
        self._pool = pool
        self._survey = Survey(pool)
        self._repair = Repair(pool, self._survey, replace)
        self._pulse: bytes | None = None
        self._rests = 0
        self._is_counted = self._has_come = False
        self._second_due_s = 0.0
        self._again: deque[WorkerHandle] = deque()
        self._round: deque[WorkerHandle] = deque()
        self._now_and_then: OrderedDict[WorkerHandle, None] = OrderedDict()
        self._programs = Programs(pool)
        self._due = pool.looks.add("see that sockets stay in their groups", self._look, LOOK_S)

    def forget(self) -> None:
        """The configuration may have changed, and with it what workers do."""
        self._repair.forget()
        self._survey.has_changed = self._has_come = True

    def changed(self, worker: WorkerHandle) -> None:
        """A worker's state has changed."""
        self._survey.has_changed = True
        self._programs.changed(worker)
        if worker.state is State.GONE:
            self._repair.gone(worker)
            self._survey.odd.discard(worker)
            # It may be an hour before its turn comes.
            self._now_and_then.pop(worker, None)

    def _look(self) -> float:
        """Survey all workers, at most once a second, then look closer at some. Returns the seconds
        until the next look."""
        if self._pool.shutdown.has_begun or not self._pool.binds:
            return math.inf
        now_s = self._pool.clock.read_s()
        if now_s >= self._second_due_s:
            self._second_due_s = on_the_beat(now_s, LOOK_S) - TOGETHER_S
            self._look_at_all(now_s)
        if self._pool.clock.read_s() - now_s >= _LOOKING_S:
            return 0.0  # the next turn of the loop is for the rest
        self._again.extend(self._survey.compare())
        if not self._survey.is_compared:
            return 0.0
        self._look_at_some()
        if not (self._again or self._round or self._has_come):
            return LOOK_S
        return LOOK_S * _AT_ONCE / min(_MOST, max(_AT_ONCE, self._survey.sockets))

    def _look_at_all(self, now_s: float) -> None:
        came = self._something_came()
        if self._survey.is_due(now_s):
            came |= self._survey.take(self._is_counted)
        if not self._again:
            self._again.extend(self._survey.odd)
        if came:
            self._has_come = True
            look_at_programs = partial(self._programs.look, self._survey.table)
            self._pool.retry.attempt("see that groups have their program", look_at_programs)
        else:
            self._rest()

    def _something_came(self) -> bool:
        """Whether connections or datagrams came since the last look, or may have."""
        before, self._pulse = self._pulse, self._pool.backend.pulse()
        self._is_counted = self._pulse is not None
        if not self._is_counted:
            binds = self._pool.binds
            self._pulse = traffic.pulse({bind.protocol for bind in binds})
        return self._pulse is None or self._pulse != before

    def _rest(self) -> None:
        """Nothing came: look closer at one worker now and then."""
        self._programs.rest()
        self._rests += 1
        if self._rests % (_RESTS if self._is_counted else 1) == 0 and not self._again:
            if not self._now_and_then:
                self._now_and_then.update(dict.fromkeys(self._pool.workers))
            if self._now_and_then:
                self._again.append(self._now_and_then.popitem(last=False)[0])

    def _look_at_some(self) -> None:
        """Look closer at workers as long as there is time, and at one at least."""
        seen, ends_s = 0, self._pool.clock.read_s() + _LOOKING_S
        for worker in self._whose_turn_it_is():
            if worker.process and _is_there(worker):
                look = partial(self._repair.look_at, worker, worker.process)
                act = f"see whether worker {worker.slot} is in its groups"
                self._pool.retry.attempt(act, look)
                seen += len(worker.binds)
            if seen >= _AT_ONCE or self._pool.clock.read_s() >= ends_s:
                return

    def _whose_turn_it_is(self) -> Iterator[WorkerHandle]:
        """Workers that the survey found odd, then all others, each once since something came."""
        if not self._round and self._has_come:
            self._has_come = False
            # Workers that are starting now were not there when something came.
            self._round.extend(filter(_is_there, self._pool.workers))
        while self._again or self._round:
            yield (self._again or self._round).popleft()


def _is_there(worker: WorkerHandle) -> bool:
    return worker.process is not None and worker.state not in (State.STARTING, State.GONE)
