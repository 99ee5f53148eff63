"""Processes that outlive the worker they belong to: told to end, and killed if they do not."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from steer.kernel import family, proc

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

WITHIN_S = 2.0
"""From SIGTERM to SIGKILL: nobody waits for what they still do."""
_LOOK_S = 0.05


class Leftovers:
    """Those of all workers of a service.

    Args:
        ended: called whenever the last of them has ended.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._began: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._began)

    def take(self, loop: AbstractEventLoop, pids: Iterable[int]) -> None:
        """Look after these from now on; they were sent SIGTERM."""
        fresh = {}
        for pid in pids:
            began_ticks = proc.start_time_ticks(pid)
            if began_ticks is not None:
                fresh[pid] = began_ticks
        if fresh:
            self._began.update(fresh)
            loop.call_later(_LOOK_S, self._look, loop, loop.time() + WITHIN_S)

    def kill(self) -> None:
        """All that are left, now."""
        with suppress(OSError):
            family.send(signal.SIGKILL, self._there())

    def _there(self) -> list[int]:
        """Those that have not ended; their start time tells them from others of that number."""
        return [
            pid
            for pid, began_ticks in self._began.items()
            if proc.start_time_ticks(pid) == began_ticks and proc.is_alive(pid)
        ]

    def _look(self, loop: AbstractEventLoop, end_s: float) -> None:
        there = list(self._began)
        with suppress(OSError):  # else it cannot be told
            there = self._there()
        self._began = {pid: self._began[pid] for pid in there}
        if loop.time() >= end_s:
            self.kill()
        # Not even SIGKILL ends what waits in the kernel.
        if there and loop.time() < end_s + WITHIN_S:
            loop.call_later(_LOOK_S, self._look, loop, end_s)
        else:
            self._began.clear()
            self._ended()
