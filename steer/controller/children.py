"""Reaps orphans: when a worker exits, the controller becomes the parent of its child processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from steer.linux import family
from steer.linux.child_ends import ChildEnds
from steer.linux.retry import Retry

_REAP_S = 0.05
"""How long to wait after the end of a child, so that many children are reaped at once."""


class Children:
    """The children of this process.

    Args:
        ends: is readable when a child has ended.
        reaped: is called with the processes that were reaped.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ends: ChildEnds,
        retry: Retry,
        reaped: Callable[[Iterable[int]], None],
    ) -> None:
        self._loop = loop
        self._ends = ends
        self._retry = retry
        self._reaped = reaped
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        self._loop.add_reader(self._ends, self._on_end)
        self._reap_soon()

    def _on_end(self) -> None:
        self._ends.clear()
        self._reap_soon()

    def _reap_soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_REAP_S, self._reap)

    def _reap(self) -> None:
        self._timer = None
        self._retry.until_done("reap children that have ended", self._reap_orphans)

    def _reap_orphans(self) -> None:
        reaped, is_all = family.reap_orphans()
        self._reaped(reaped)
        if not is_all:
            self._reap_soon()
