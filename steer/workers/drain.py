"""Draining workers that are retired: waiting until their accept queues are empty.

Connections in the queue would be dropped by a server that is told to finish. uvicorn, for example,
closes connections that have not sent a request.

A reload drains all old workers at once. Each turn of the loop looks at a few of them, so that other
requests are served in between, and reads what the kernel tells about all of them once.
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
"""The time for answering connections that were just accepted; idle ones stay longer."""
_SELDOM_S = 1.0
"""The longest pause between looks for late connections."""
_FLOWS_UNTIL = 0.9
"""The share of --graceful-timeout in which flows may continue."""
_TURN_S = _REST_S = 0.005
"""The time for later looks in one turn of the loop, and the pause after it."""
_FIRST_TURN_S = 0.001
"""The time for first looks in one turn of the loop. A reload waits for all of them, so there is no
pause."""

_Pauses = Generator[float, None, None]
"""Looks at one worker; yields the seconds until the next look."""


class _Loop(Protocol):
    """What of an event loop is used."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> _Handle: ...


class _Handle(Protocol):
    def cancel(self) -> None: ...


class Drain:
    """The drain of one worker.

    Args:
        publication: the first look comes when this publication is synchronized.
    """

    def __init__(self, worker: WorkerHandle, publication: int, pauses: _Pauses) -> None:
        self.worker = worker
        self.publication = publication
        self.pauses = pauses
        self.is_cancelled = False

    def cancel(self) -> None:
        """Stop looking at the worker."""
        self.is_cancelled = True


class Drainer:
    """Reports DRAINED for each worker whose queue is empty, then migrates late connections.

    Args:
        report: called with the event.
        graceful_timeout_s: how long a worker may take to finish, as configured now.
        now_s: returns a time.
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
        """Drain a worker that has left the table, or will in this turn of the loop."""
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
        """Take a turn after so many seconds, unless one is due earlier."""
        turn_s = self._now_s() + after_s
        if turn_s < self._turn_s:
            if self._next is not None:
                self._next.cancel()
            self._turn_s, self._next = turn_s, self._loop.call_later(after_s, self._turn)

    def _turn(self) -> None:
        """Look at the workers that are due, as long as there is time."""
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
        """Take the next look at a worker. If it fails, the drain begins again."""
        worker = drain.worker
        if drain.is_cancelled or not worker.process:
            return
        try:
            pause_s = next(drain.pauses, None)
        except Exception as error:  # noqa: BLE001 - whatever fails, the worker has to be told to finish
            self._retry.failed(f"see that nothing waits for worker {worker.slot}", error)
            drain.pauses, pause_s = self._drain(worker), AGAIN_S
        if pause_s is not None and not drain.is_cancelled:
            self._put(drain, pause_s)

    def _drain(self, worker: WorkerHandle) -> _Pauses:
        """Wait for the queue, flows and open requests of a worker; then migrate connections that
        arrive late. A handshake that began before the table changed may complete at any time, at a
        listener that the worker keeps open but accepts from no more."""
        remains, clock = self._remains, self._clock
        whole_s, began_s = self._graceful_timeout_s(), clock.now_s()
        yield from self._until_synchronized()
        yield from remains.until_forgotten(worker, began_s + _FLOWS_UNTIL * whole_s)
        # Half of the remaining time is for finishing open requests.
        limit_s = (began_s + whole_s - clock.now_s()) / 2
        end_s = clock.now_s() + limit_s
        synchronized_s = yield from self._until_synchronized()
        yield from remains.until_queue_is_empty(worker, limit_s, synchronized_s)
        # A worker that closed its listeners itself may be finishing; a signal could interrupt that.
        linger_s = limit_s if worker.closed_its_listeners else _LINGER_S
        yield from remains.until_answered(worker, min(end_s, clock.now_s() + linger_s))
        self._report(worker, Event.DRAINED)
        pause_s = LOOK_AGAIN_S
        while worker.process:
            remains.migrate_late(worker, worker.process)
            yield pause_s
            pause_s = min(_SELDOM_S, 1.1 * pause_s)

    def _until_synchronized(self) -> Generator[float, None, float]:
        """Wait until the changes so far are synchronized. Returns when that was first seen."""
        publication = self._publisher.next_publication()
        while not self._publisher.is_synchronized(publication):
            yield LOOK_S
        # The first worker that sees it records it for all, so that they share looks at queues.
        if publication > self._synchronized[0]:
            self._synchronized = publication, self._now_s()
        return self._synchronized[1]


async def until_empty(
    publisher: Publisher, remains: Remains, worker: WorkerHandle, limit_s: float
) -> bool:
    """Wait until the worker's queue is empty, and migrate what it does not accept soon.

    Returns:
        Whether the queue is empty; false after `limit_s`.

    Raises:
        KernelError: the table could not be published, so the worker is still selected.
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
