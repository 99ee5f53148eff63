"""When the table is published, and when its grace period is over.

All changes of one turn of the event loop are published together. Programs that are running while
the table is published may still read the old table, for some 20 ms. A thread waits until they have
ended: this is the grace period, and the publication is synchronized then, as in RCU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from steer.backends.base import Selector
from steer.errors import NoThread
from steer.linux.retry import AGAIN_S, Retry
from steer.loader import shared_memory

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Handle, Task

_ACT = "publish the table"


class Publisher:
    """Publishes the table, and calls back when a publication is synchronized.

    Args:
        publish: fills and publishes the table of the backend in force.
        backend: returns the backend in force.
    """

    def __init__(
        self, publish: Callable[[], None], backend: Callable[[], Selector], retry: Retry
    ) -> None:
        self._publish = publish
        self._backend = backend
        self._retry = retry
        self._due: Handle | None = None
        self._published_waiters: list[Future[None]] = []
        self._published = self._synchronized = 0
        self._callbacks: list[tuple[str, Callable[[], object], int]] = []
        self._grace_period: Task[None] | None = None
        self._released = False
        self._loop: AbstractEventLoop | None = None

    def watch(self, loop: AbstractEventLoop) -> None:
        """Use this event loop from here on."""
        self._loop = loop
        if self._backend().grace_period() is not None:
            self.has_published()  # before there was a loop

    def soon(self) -> None:
        """Publish after this turn of the loop, together with its other changes."""
        assert self._loop
        if self._due is None:
            self._due = self._loop.call_soon(self._publish_unless_waiting)

    def now(self) -> None:
        """Publish now. If that fails, it is retried later. Raises KernelError."""
        assert self._loop
        if self._due is not None:
            self._due.cancel()
        self._due = self._loop.call_later(AGAIN_S, self._publish_unless_waiting)
        self._publish()
        self._due.cancel()
        self._due = None
        self.has_published()

    def attempt(self) -> bool:
        """Publish now. If that fails, it is logged and retried later."""
        return self._retry.attempt(_ACT, self.now)

    def if_due(self) -> None:
        """Publish now if there are unpublished changes. Raises KernelError."""
        if self._due is not None:
            self.now()

    def _publish_unless_waiting(self) -> None:
        """Publish, unless a grace period is not over: programs may still read the half of the
        table that would be overwritten. Then it is done after that, with all changes until then."""
        if self._grace_period is None:
            self._try()

    def _try(self) -> None:
        self.attempt()
        self._wake_waiters()

    async def published(self) -> None:
        """Wait until the changes so far are published, or that has failed once."""
        if self._due is not None:
            assert self._loop
            self._published_waiters.append(self._loop.create_future())
            await self._published_waiters[-1]

    def _wake_waiters(self) -> None:
        waiters, self._published_waiters = self._published_waiters, []
        for each in waiters:
            _set(each)

    def has_published(self) -> None:
        """The table was published, by `now` or by the caller."""
        self._published += 1
        self._wake_waiters()
        if self._backend().grace_period() is None and self._grace_period is None:
            self._has_synchronized(self._published)
        elif self._grace_period is None:
            assert self._loop
            self._grace_period = self._loop.create_task(self._synchronize())

    async def _synchronize(self) -> None:
        try:
            while self._synchronized < self._published and not self._released:
                number, backend = self._published, self._backend()
                publication = backend.grace_period()
                await _wait_for_programs()
                if publication is not None:
                    backend.grace_period_ended(publication)
                self._has_synchronized(number)
                if self._due is not None and number == self._published and not self._released:
                    self._try()
        finally:
            self._grace_period = None

    def _has_synchronized(self, number: int) -> None:
        self._synchronized = number
        callbacks, self._callbacks = self._callbacks, []
        for each in callbacks:
            self.when_synchronized(*each)

    def next_publication(self) -> int:
        """The number of the publication that contains the changes so far."""
        return self._published + (self._due is not None)

    def is_synchronized(self, number: int) -> bool:
        """Whether the grace period of this publication is over, so that every connection selected
        by an older table is in its accept queue."""
        return self._released or number <= self._synchronized

    def when_synchronized(
        self, act: str, do: Callable[[], object], number: int | None = None
    ) -> None:
        """Call `do` once a publication is synchronized, now if it is.

        Args:
            act: what `do` does, for the log.
            number: the publication; None: the next one.
        """
        number = self.next_publication() if number is None else number
        if self.is_synchronized(number):
            self._retry.attempt(act, do)
        else:
            self._callbacks.append((act, do, number))

    async def synchronized(self) -> None:
        """Wait until the changes so far are published and synchronized."""
        assert self._loop
        done = self._loop.create_future()
        self.when_synchronized("wait for programs", partial(_set, done))
        await done

    def release(self) -> None:
        """The service stops: wait for nothing any more."""
        self._released = True
        self._wake_waiters()
        self._has_synchronized(self._published)


def _set(done: Future[None]) -> None:
    """Set the result, unless the future was cancelled."""
    if not done.done():
        done.set_result(None)


async def _wait_for_programs() -> None:
    """Wait until all programs that are running now have ended."""
    from steer.linux.background import in_background  # imported here, as it imports asyncio

    try:
        await in_background(shared_memory.wait_for_programs)
    except NoThread:
        shared_memory.wait_for_programs()
