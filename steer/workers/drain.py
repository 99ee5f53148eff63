"""Draining workers that are retired: waiting until nothing waits for them.

A server that is told to end while something does would drop it: uvicorn closes connections that
have not asked for anything.

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
from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol

from steer.linux.retry import AGAIN_S, Retry
from steer.workers.clock import Clock
from steer.workers.lifecycle import Event
from steer.workers.publisher import Publisher
from steer.workers.remains import LOOK_AGAIN_S, LOOK_S, Remains

if TYPE_CHECKING:
    from steer.workers.handle import WorkerHandle

_LINGER_S = 1.0
"""So long connections just accepted may take to be answered; idle ones stay longer."""
_SELDOM_S = 1.0
"""The longest pause between looks whether anything has come to wait."""
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
        publication: before which nobody looks.
    """

    def __init__(self, worker: WorkerHandle, publication: int, pauses: _Pauses) -> None:
        self.worker = worker
        self.publication = publication
        self.pauses = pauses
        self.is_cancelled = False

    def cancel(self) -> None:
        """Nobody is to look any more."""
        self.is_cancelled = True


class Drainer:
    """Reports DRAINED of each worker once nothing waits for it; then sees that it stays so.

    Args:
        report: told of the event.
        graceful_timeout_s: how long a worker may take to finish, as configured now.
        now_s: a time.
    """

    def __init__(
        self,
        loop: _Loop,
        remains: Remains,
        publisher: Publisher,
        clock: Clock,
        retry: Retry,
        report: Callable[[WorkerHandle, Event], None],
        graceful_timeout_s: Callable[[], float],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._remains = remains
        self._publisher = publisher
        self._clock = clock
        self._retry = retry
        self._report = report
        self._graceful_timeout_s = graceful_timeout_s
        self._now_s = now_s
        self._first: deque[Drain] = deque()
        self._publication = -1
        self._due: list[tuple[float, int, Drain]] = []
        self._number = count()
        self._turn_s = math.inf
        self._next: _Handle | None = None
        self._synchronized = -1, -math.inf

    def begin(self, worker: WorkerHandle) -> Drain:
        """For a worker that was just taken out of the table, or is about to be in this turn."""
        publication = self._publisher.next_publication()
        drain = Drain(worker, publication, self._drain(worker))
        self._first.append(drain)
        if publication != self._publication or self._publisher.is_synchronized(publication):
            self._publication = publication
            begin = partial(self._call, 0.0)
            self._publisher.when_synchronized("look at workers that are to end", begin, publication)
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
        with self._retry.spare.lent():
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
        return bool(self._first) and self._publisher.is_synchronized(self._first[0].publication)

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
        worker = drain.worker
        if drain.is_cancelled or not worker.process:
            return
        try:
            pause_s = next(drain.pauses, None)
        except Exception as error:  # noqa: BLE001 - or it would never be told to finish
            self._retry.failed(f"see that nothing waits for worker {worker.slot}", error)
            drain.pauses, pause_s = self._drain(worker), AGAIN_S
        if pause_s is not None and not drain.is_cancelled:
            self._put(drain, pause_s)

    def _drain(self, worker: WorkerHandle) -> _Pauses:
        """A handshake that began before the table changed may end now, and the connection wait
        at a listener that its worker has turned away from, but keeps open."""
        remains, clock = self._remains, self._clock
        whole_s, began_s = self._graceful_timeout_s(), clock.now_s()
        yield from self._until_synchronized()
        yield from remains.until_forgotten(worker, began_s + _FLOWS_UNTIL * whole_s)
        # Half of what is left is for finishing what it has.
        limit_s = (began_s + whole_s - clock.now_s()) / 2
        end_s = clock.now_s() + limit_s
        synchronized_s = yield from self._until_synchronized()
        yield from remains.until_queue_is_empty(worker, limit_s, synchronized_s)
        # One that closed its listeners by itself may be finishing: a signal could cut that short.
        linger_s = limit_s if worker.closed_its_listeners else _LINGER_S
        yield from remains.until_answered(worker, min(end_s, clock.now_s() + linger_s))
        self._report(worker, Event.DRAINED)
        pause_s = LOOK_AGAIN_S
        while worker.process:
            remains.migrate_late(worker, worker.process)
            yield pause_s
            pause_s = min(_SELDOM_S, 1.1 * pause_s)

    def _until_synchronized(self) -> Generator[float, None, float]:
        """Until all that was chosen before this turn is in its queue; when that was so."""
        publication = self._publisher.next_publication()
        while not self._publisher.is_synchronized(publication):
            yield LOOK_S
        # Seen by the first for all: later looks at queues do for each.
        if publication > self._synchronized[0]:
            self._synchronized = publication, self._now_s()
        return self._synchronized[1]


async def until_empty(
    publisher: Publisher, remains: Remains, worker: WorkerHandle, limit_s: float
) -> bool:
    """Until nothing waits for the worker; what can be migrated is not waited for long.

    Returns:
        Whether that is so: false after `limit_s`.

    Raises:
        KernelError: it is selected still.
    """
    await publisher.published()
    publisher.if_due()  # raises why that failed
    await publisher.synchronized()
    looks = remains.until_queue_is_empty(worker, limit_s, time.monotonic())
    while True:
        try:
            pause_s = next(looks)
        except StopIteration as end:
            return bool(end.value)
        await asyncio.sleep(pause_s)
