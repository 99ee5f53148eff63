"""Waiting until nothing waits for workers that are no longer chosen.

What was chosen before the table changed may still be on its way into the worker's
queue, in the queue, or accepted with its request not yet read. A server that is told to
end then would drop it: uvicorn closes connections that have not asked for anything.

A reload makes all old workers wait at once. They are looked at a few in each turn of the loop,
so that whoever else asks for something is not kept waiting, and what the kernel tells of all of
them is asked for once a turn.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol

from steer.errors import KernelError
from steer.linux import processes
from steer.linux.retry import AGAIN_S
from steer.workers.lifecycle import Event

if TYPE_CHECKING:
    from steer.workers.handle import WorkerHandle
    from steer.workers.pool import WorkerPool
    from steer.workers.process import WorkerProcess

_TAKE_S = 0.1
"""So long a worker may take itself what waits for it, before that is moved."""
_LINGER_S = 1.0
"""So long connections just accepted may take to be answered; idle ones stay longer."""
_UNSEEN_S = 1.0
"""So long a worker may take to take what waits for it, where that cannot be seen."""
_LOOK_S = 0.01
_LOOK_AGAIN_S, _SELDOM_S = 0.1, 1.0
"""Ever more seldom, as most handshakes end soon: hundreds may take long to finish."""
_LOOK_AT_FLOWS_S = 0.25
_FLOWS_UNTIL = 0.9
"""So much of --graceful-timeout flows may go on."""
_TURN_S = _REST_S = 0.005
"""So long workers are looked at again without a break, and so long the loop is others' then."""
_FIRST_TURN_S = 0.001
"""So long those are looked at for the first time, each turn of the loop: a reload waits for all of
them, and who asks for something meanwhile for some turns."""

_Pauses = Generator[float, None, None]
"""What is done for one worker, with so many seconds in between."""


class _Loop(Protocol):
    """What of an event loop is used."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> _Handle: ...


class _Handle(Protocol):
    def cancel(self) -> None: ...


class Drain:
    """One worker's.

    Args:
        flip: before which nobody looks.
    """

    def __init__(self, place: WorkerHandle, flip: int, pauses: _Pauses) -> None:
        self.place = place
        self.flip = flip
        self.pauses = pauses
        self.is_cancelled = False

    def cancel(self) -> None:
        """Nobody is to look any more."""
        self.is_cancelled = True


class Drainer:
    """Reports DRAINED of each worker once nothing waits for it; then sees that it stays so.

    Args:
        now_s: a time.
    """

    def __init__(
        self, pool: WorkerPool, loop: _Loop, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool = pool
        self._loop = loop
        self._now_s = now_s
        self._first: deque[Drain] = deque()
        self._flip = -1
        self._due: list[tuple[float, int, Drain]] = []
        self._number = count()
        self._turn_s = math.inf
        self._next: _Handle | None = None
        self._settled = -1, -math.inf

    def begin(self, place: WorkerHandle) -> Drain:
        """For a worker that was just taken out of the table, or is about to be in this turn."""
        flip = self._pool.selection.flip_now_due()
        drain = Drain(place, flip, self._drain(place))
        self._first.append(drain)
        if flip != self._flip or self._pool.selection.has_settled(flip):
            self._flip = flip
            begin = partial(self._call, 0.0)
            self._pool.selection.when_settled("look at workers that are to end", begin, flip)
        return drain

    def _put(self, drain: Drain, pause_s: float) -> None:
        heapq.heappush(self._due, (self._now_s() + pause_s, next(self._number), drain))

    def _call(self, after_s: float) -> None:
        """Those who are due by then are looked at in one turn."""
        turn_s = self._now_s() + after_s
        if turn_s < self._turn_s:
            if self._next is not None:
                self._next.cancel()
            self._turn_s, self._next = turn_s, self._loop.call_later(after_s, self._turn)

    def _turn(self) -> None:
        """Look at those who are due, as long as there is time."""
        self._turn_s, self._next = math.inf, None
        with self._pool.retry.spare.lent():
            if self._is_first_due:
                self._look_at_first()
            else:
                self._look_again()
        if self._is_first_due:
            self._call(0.0)
        elif self._due:
            self._call(max(_REST_S, self._due[0][0] - self._now_s()))

    @property
    def _is_first_due(self) -> bool:
        return bool(self._first) and self._pool.selection.has_settled(self._first[0].flip)

    def _look_at_first(self) -> None:
        end_s = self._now_s() + _FIRST_TURN_S
        while self._is_first_due:
            self._go_on(self._first.popleft())
            if self._now_s() >= end_s:
                break

    def _look_again(self) -> None:
        now_s = began_s = self._now_s()
        while self._due and self._due[0][0] <= began_s and now_s - began_s < _TURN_S:
            self._go_on(heapq.heappop(self._due)[-1])
            now_s = self._now_s()

    def _go_on(self, drain: Drain) -> None:
        """What fails is tried again."""
        place = drain.place
        if drain.is_cancelled or not place.process:
            return
        try:
            pause_s = next(drain.pauses, None)
        except Exception as error:  # noqa: BLE001 - or it would never be told to finish
            self._pool.retry.failed(f"see that nothing waits for worker {place.slot}", error)
            drain.pauses, pause_s = self._drain(place), AGAIN_S
        if pause_s is not None and not drain.is_cancelled:
            self._put(drain, pause_s)

    def _drain(self, place: WorkerHandle) -> _Pauses:
        """A handshake that began before the table changed may end now, and the connection wait
        at a listener that its worker has turned away from, but keeps open."""
        pool, clock = self._pool, self._pool.clock
        whole_s, began_s = pool.generation.plan.service.graceful_timeout, clock.now_s()
        yield from self._until_settled()
        yield from _until_forgotten(pool, place, began_s + _FLOWS_UNTIL * whole_s)
        # Half of what is left is for finishing what it has.
        limit_s = (began_s + whole_s - clock.now_s()) / 2
        end_s = clock.now_s() + limit_s
        settled_s = yield from self._until_settled()
        yield from _emptying(pool, place, limit_s, settled_s)
        # One that closed its listeners by itself may be finishing: a signal could cut that short.
        linger_s = limit_s if place.closed_its_listeners else _LINGER_S
        yield from _until_answered(pool, place, min(end_s, clock.now_s() + linger_s))
        pool.report(place, Event.DRAINED)
        pause_s = _LOOK_AGAIN_S
        while place.process:
            if _may_wait(pool, place.process):
                pool.migration.migrate(place)
            yield pause_s
            pause_s = min(_SELDOM_S, 1.1 * pause_s)

    def _until_settled(self) -> Generator[float, None, float]:
        """Until all that was chosen before this turn is in its queue; when that was so."""
        flip = self._pool.selection.flip_now_due()
        while not self._pool.selection.has_settled(flip):
            yield _LOOK_S
        # Seen by the first for all: later looks at queues do for each.
        if flip > self._settled[0]:
            self._settled = flip, self._now_s()
        return self._settled[1]


async def until_empty(pool: WorkerPool, place: WorkerHandle, limit_s: float) -> bool:
    """Until nothing waits for the worker; what can be moved is not waited for long.

    Returns:
        Whether that is so: false after `limit_s`.

    Raises:
        KernelError: it is chosen still.
    """
    await pool.selection.flipped()
    pool.selection.settle()  # raises why that failed
    await pool.selection.settled()
    looks = _emptying(pool, place, limit_s, time.monotonic())
    while True:
        try:
            pause_s = next(looks)
        except StopIteration as end:
            return bool(end.value)
        await asyncio.sleep(pause_s)


def _emptying(
    pool: WorkerPool, place: WorkerHandle, limit_s: float, settled_s: float
) -> Generator[float, None, bool]:
    """As `until_empty`, with the pauses.

    Args:
        settled_s: as it was after that time.
    """
    began_s = pool.clock.now_s()
    while place.process and not place.serves:
        with pool.retry.spare.lent():
            queues = pool.queues.of(place.process, settled_s)
        waited_s = pool.clock.now_s() - began_s
        if queues is None and waited_s > _UNSEEN_S:
            return True
        if queues is not None and not any(each.queued for each in queues.values()):
            return True
        if waited_s > limit_s:
            return False
        if waited_s > _TAKE_S:
            pool.migration.migrate(place)
        yield _LOOK_S
    return True


def _may_wait(pool: WorkerPool, worker: WorkerProcess) -> bool:
    """Whether something waits for it, or that cannot be seen without its sockets."""
    queues = pool.queues.of(worker)
    return queues is None or any(each.queued for each in queues.values())


def _until_forgotten(pool: WorkerPool, place: WorkerHandle, end_s: float) -> Iterator[float]:
    """Until the flows that a policy remembers to be there are idle; then they are forgotten."""
    steering = pool.steering
    if place.hung or not steering.remembers():
        return
    got = _datagrams(pool, place)
    if not got:
        return
    idle_s, last_s = steering.own().params.get("idle", 0), pool.clock.now_s()
    while place.process and (now_s := pool.clock.now_s()) < min(end_s, last_s + idle_s):
        yield min(_LOOK_AT_FLOWS_S, end_s - now_s)
        if (now := _datagrams(pool, place)) != got:
            got, last_s = now, now_s
    steering.let_go(place.slot)


def _datagrams(pool: WorkerPool, place: WorkerHandle) -> int | None:
    """Sent to it so far; None where nobody counts."""
    binds = place.generation.plan.binds
    over_udp = [at for at, bind in enumerate(binds) if bind.protocol == "udp"]
    counts = [pool.steering.counts(place.slot, at) for at in over_udp]
    return sum(each.selected for each in counts if each) if any(counts) else None


def _until_answered(pool: WorkerPool, place: WorkerHandle, end_s: float) -> Iterator[float]:
    pause_s = _LOOK_S
    while place.process and _has_connections(pool, place, place.process):
        if pool.clock.now_s() >= end_s:
            return
        yield pause_s
        pause_s = min(_LOOK_AGAIN_S, 1.5 * pause_s)


def _has_connections(pool: WorkerPool, place: WorkerHandle, process: WorkerProcess) -> bool:
    """Where they are counted and there are some, its files need no look."""
    if pool.steering.open(place.slot):
        return True
    try:
        return bool(processes.open_sockets(process.pid) - place.others)
    except KernelError:
        return True
