"""The stop of a service: it is over when no process of a worker is left."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from steer.guard.client import GuardClient
from steer.linux import family
from steer.linux.retry import Retry
from steer.workers.handle import WorkerHandle
from steer.workers.leftovers import Leftovers
from steer.workers.selection import Selection

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future


class Shutdown:
    """Whether the service is stopping, and what is left of it.

    Args:
        workers: all workers of the service.

    Attributes:
        has_begun: whether the service is stopping: then no worker is started any more.
        within_s: how long workers may take to finish.
        is_quick: whether workers need not finish open requests.
        ended: a future that is done when all processes have ended.
    """

    def __init__(
        self,
        workers: Collection[WorkerHandle],
        selection: Selection,
        guard: GuardClient,
        retry: Retry,
    ) -> None:
        self.has_begun = self.is_quick = False
        self.within_s = 0.0
        self._workers = workers
        self._selection = selection
        self._guard = guard
        self._retry = retry
        self._leftovers = Leftovers(self.end_if_empty)
        self._has_told_leftovers = False
        self._loop: AbstractEventLoop
        self.ended: Future[None]

    def watch(self, loop: AbstractEventLoop) -> None:
        """Use this event loop from here on."""
        self._loop = loop
        self.ended = loop.create_future()

    def begin(self, within_s: float, is_quick: bool) -> None:
        """Begin to stop; see the attributes. Nothing is left to adopt, and ports are released."""
        self.has_begun, self.within_s, self.is_quick = True, within_s, is_quick
        self._retry.attempt("have nobody adopt what is left", self._leave_nothing_to_adopt)
        self._retry.attempt("let go of the ports", self._selection.release)

    def _leave_nothing_to_adopt(self) -> None:
        self._guard.give_up()
        is_held = self._selection.backend.held
        held = (worker.process for worker in self._workers if is_held(worker.slot))
        self._guard.let_go(*(process.key for process in held if process))

    def take_leftovers(self, pids: Iterable[int]) -> None:
        """Kill these processes that a worker left behind, unless they end soon by themselves."""
        self._leftovers.take(self._loop, pids)

    def kill_leftovers(self) -> None:
        """Now."""
        self._leftovers.kill()

    def end_if_empty(self) -> None:
        """The last worker may have ended. What none of them is known to have left behind ends
        with it."""
        if not self.has_begun or self._workers or self._leftovers or self.ended.done():
            return
        left = [] if self._has_told_leftovers else self._left_behind()
        if left:
            self._has_told_leftovers = True
            family.send(signal.SIGTERM, left)
            self.take_leftovers(left)
        else:
            self.ended.set_result(None)

    def _left_behind(self) -> list[int]:
        nobody: list[int] = []
        return self._retry.result("look for what workers left behind", family.left_behind, nobody)
