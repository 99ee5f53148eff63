"""Processes that outlive their worker: they are told to exit, and killed if they do not."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from steer.linux import family, processes

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

WITHIN_S = 2.0
"""The time from SIGTERM to SIGKILL."""
_LOOK_S = 0.05
_MOST_LOOKING = 0.05
"""The share of time for looking at them, as there may be hundreds."""


class Left(msgspec.Struct, eq=False):
    """One such process.

    Args:
        began_ticks: when it started, to detect that its process id is reused.
        end_s: when it is killed.
    """

    pid: int
    began_ticks: int
    end_s: float

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return processes.is_still(self.pid, self.began_ticks)


class Leftovers:
    """The leftover processes of all workers.

    Args:
        ended: called whenever none is left.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._left: list[Left] = []
        self._is_due = False

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, loop: AbstractEventLoop, pids: Iterable[int]) -> None:
        """Watch these processes, which were sent SIGTERM."""
        end_s = loop.time() + WITHIN_S
        for pid in pids:
            began_ticks = processes.start_time_ticks(pid)
            if began_ticks is not None:
                self._left.append(Left(pid, began_ticks, end_s))
        self._look_in(loop, _LOOK_S)

    def kill(self) -> None:
        """Kill all that are left, now."""
        _kill(each for each in self._left if each.is_running)

    def _look_in(self, loop: AbstractEventLoop, after_s: float) -> None:
        if self._left and not self._is_due:
            self._is_due = True
            loop.call_later(after_s, self._look, loop)

    def _look(self, loop: AbstractEventLoop) -> None:
        self._is_due = False
        began_s = loop.time()
        self._left = [each for each in self._left if each.is_running]
        now_s = loop.time()
        _kill(each for each in self._left if each.end_s <= now_s)
        # A process that is stuck in the kernel survives even SIGKILL; stop waiting for it.
        self._left = [each for each in self._left if now_s < each.end_s + WITHIN_S]
        self._look_in(loop, max(_LOOK_S, (loop.time() - began_s) / _MOST_LOOKING))
        if not self._left:
            self._ended()


def _kill(left: Iterable[Left]) -> None:
    family.send(signal.SIGKILL, [each.pid for each in left])
