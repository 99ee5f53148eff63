"""When a change of who is selected is published, and when nothing selected before is under way.

Whatever changes in one turn of the loop is published together. Programs that run while the table
is published may still select as before, for some 20 ms: they are waited for beside the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from steer.backends.base import Selector
from steer.linux.retry import AGAIN_S, Retry
from steer.loader import shared_memory

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Handle, Task

_ACT = "choose among the workers"


class Publisher:
    """Publishes who is selected. It needs a loop, see `watch`.

    Args:
        publish: tells the backend who serves.
        backend: returns the backend in force.
    """

    def __init__(
        self, publish: Callable[[], None], backend: Callable[[], Selector], retry: Retry
    ) -> None:
        self._publish = publish
        self._backend = backend
        self._retry = retry
        self._due: Handle | None = None
        self._told_published: list[Future[None]] = []
        self._published = self._synchronized = 0
        self._awaiting: list[tuple[str, Callable[[], object], int]] = []
        self._waiting: Task[None] | None = None
        self._released = False
        self._loop: AbstractEventLoop | None = None

    def watch(self, loop: AbstractEventLoop) -> None:
        """From here on there is a loop."""
        self._loop = loop
        if self._backend().grace_period() is not None:
            self.has_published()  # when there was no loop

    def soon(self) -> None:
        """Publish together with what else happens in the same turn of the loop."""
        assert self._loop
        if self._due is None:
            self._due = self._loop.call_soon(self._in_its_turn)

    def now(self) -> None:
        """Publish. If it fails it is tried again. Raises KernelError."""
        assert self._loop
        if self._due is not None:
            self._due.cancel()
        self._due = self._loop.call_later(AGAIN_S, self._in_its_turn)
        self._publish()
        self._due.cancel()
        self._due = None
        self.has_published()

    def attempt(self) -> bool:
        """As `now`, but a failure is logged."""
        return self._retry.attempt(_ACT, self.now)

    def if_due(self) -> None:
        """Have who is said to be ready in the table by now. Raises KernelError."""
        if self._due is not None:
            self.now()

    def _in_its_turn(self) -> None:
        """While programs may still read what would be overwritten, it is done after that; workers
        that get ready or end meanwhile are part of it."""
        if self._waiting is None:
            self._try()

    def _try(self) -> None:
        self.attempt()
        self._tell_published()

    async def published(self) -> None:
        """Wait until who is said to be ready is in the table, or that was tried."""
        if self._due is not None:
            assert self._loop
            self._told_published.append(self._loop.create_future())
            await self._told_published[-1]

    def _tell_published(self) -> None:
        told, self._told_published = self._told_published, []
        for each in told:
            _set(each)

    def has_published(self) -> None:
        """The table was published by `now`, or by whom it is called."""
        self._published += 1
        self._tell_published()
        if self._backend().grace_period() is None and self._waiting is None:
            self._has_synchronized(self._published)
        elif self._waiting is None:
            assert self._loop
            self._waiting = self._loop.create_task(self._synchronize())

    async def _synchronize(self) -> None:
        try:
            while self._synchronized < self._published and not self._released:
                number, backend = self._published, self._backend()
                publication = backend.grace_period()
                await _programs_end()
                if publication is not None:
                    backend.grace_period_ended(publication)
                self._has_synchronized(number)
                if self._due is not None and number == self._published and not self._released:
                    self._try()
        finally:
            self._waiting = None

    def _has_synchronized(self, number: int) -> None:
        self._synchronized = number
        waiting, self._awaiting = self._awaiting, []
        for each in waiting:
            self.when_synchronized(*each)

    def next_publication(self) -> int:
        """For `is_synchronized`: the publication after which nobody is selected who does not serve
        now."""
        return self._published + (self._due is not None)

    def is_synchronized(self, number: int) -> bool:
        """Whether all that was selected before this publication is in its queue."""
        return self._released or number <= self._synchronized

    def when_synchronized(
        self, act: str, do: Callable[[], object], number: int | None = None
    ) -> None:
        """Do it once all that was selected before who serves now is in its queue.

        Args:
            number: before this publication instead.
        """
        number = self.next_publication() if number is None else number
        if self.is_synchronized(number):
            self._retry.attempt(act, do)
        else:
            self._awaiting.append((act, do, number))

    async def synchronized(self) -> None:
        """Wait until all that was selected before who serves now is in its queue."""
        assert self._loop
        done = self._loop.create_future()
        self.when_synchronized("wait for programs", partial(_set, done))
        await done

    def release(self) -> None:
        """The service ends: nobody waits any more."""
        self._released = True
        self._tell_published()
        self._has_synchronized(self._published)


def _set(done: Future[None]) -> None:
    """Unless nobody waits for it any more."""
    if not done.done():
        done.set_result(None)


async def _programs_end() -> None:
    """Wait until all that run now have ended."""
    from steer.linux.background import in_background  # there by now; it needs asyncio

    try:
        await in_background(shared_memory.wait_for_programs)
    except RuntimeError:  # no more threads
        shared_memory.wait_for_programs()
