"""Something that is done to many workers, a few of them in each turn of the event loop."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from steer.workers.handle import WorkerHandle

_STEP_S = 0.005
"""A step may take this long; it handles one worker at least."""


class InSteps:
    """A queue of workers that `do` is called with. Each turn of the loop takes one step, so that
    the loop can serve others in between.

    Args:
        do: called with each worker.
        finished: called whenever the queue has become empty.
        around: entered for each step.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        do: Callable[[WorkerHandle], object],
        finished: Callable[[], object] = lambda: None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._loop = loop
        self._do = do
        self._finished = finished
        self._around = around
        self._waiting: OrderedDict[WorkerHandle, None] = OrderedDict()
        self._is_due = False

    def begin(self, workers: Iterable[WorkerHandle]) -> None:
        """Add these; the first step is taken now, unless one is due already."""
        self._waiting.update(dict.fromkeys(workers))
        if not self._is_due:
            self._step()

    def begin_soon(self, workers: Iterable[WorkerHandle]) -> None:
        """Add these; the first step is taken in the next turn of the loop."""
        self._waiting.update(dict.fromkeys(workers))
        self._step_soon()

    def _step_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._is_due = False
        end_s = time.monotonic() + _STEP_S
        try:
            with self._around():
                while self._waiting:
                    self._do(self._waiting.popitem(last=False)[0])
                    if time.monotonic() >= end_s:
                        break
        finally:
            if self._waiting:
                self._step_soon()
        if not self._waiting:
            self._finished()
