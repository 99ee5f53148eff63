"""All periodic looks, in one timer: waking the controller costs more than most looks do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer.linux.retry import Retry
    from steer.workers.clock import Clock

TOGETHER_S = 0.05
"""Looks that are due within this time of each other are taken together."""
_STEP_S = 0.005
"""After this time, looks that are still due wait for the next turn of the loop."""
_AGAIN_S = 1.0


class Look:
    """One periodic look.

    Args:
        act: what it does, for the log.
        look: looks, and returns the seconds until the next call.
    """

    def __init__(self, looks: Looks, act: str, look: Callable[[], float]) -> None:
        self.act = act
        self.look = look
        self.due_s = 0.0
        self._looks = looks

    def within(self, seconds: float) -> None:
        """Have it called within this time."""
        self._looks.take_within(self, seconds)


class Looks:
    """Takes looks at the beats of a clock."""

    def __init__(self, clock: Clock, retry: Retry) -> None:
        self._clock = clock
        self._retry = retry
        self._looks: list[Look] = []

    def add(self, act: str, look: Callable[[], float], after_s: float) -> Look:
        """Add a look.

        Args:
            act: what it does, for the log.
            after_s: the time until the first call.
        """
        added = Look(self, act, look)
        added.due_s = self._clock.read_s() + after_s
        self._looks.append(added)
        return added

    def take(self) -> float:
        """Take looks that are due, as long as there is time. Returns the seconds until the next."""
        now_s = read_s = self._clock.read_s()
        with self._retry.spare.lent():
            for each in sorted(self._looks, key=_due_s):
                if each.due_s > now_s + TOGETHER_S or read_s - now_s >= _STEP_S:
                    break
                again_s = self._retry.result(each.act, each.look, _AGAIN_S)
                read_s = self._clock.read_s()
                each.due_s = on_the_beat(read_s, again_s)
        return self._next_in_s()

    def _next_in_s(self) -> float:
        due_s = min((each.due_s for each in self._looks), default=math.inf)
        return max(0.0, due_s - self._clock.read_s())

    def take_within(self, look: Look, within_s: float) -> None:
        """See `Look.within`."""
        due_s = self._clock.read_s() + within_s
        if due_s < look.due_s:
            look.due_s = due_s
            self._clock.beat_within(within_s)


def _due_s(look: Look) -> float:
    return look.due_s


def on_the_beat(now_s: float, after_s: float) -> float:
    """The time after about `after_s`, aligned so that looks with the same period coincide."""
    if not after_s or math.isinf(after_s):
        return now_s + after_s
    beats = math.floor((now_s + TOGETHER_S) / after_s) + 1
    due_s = beats * after_s
    return due_s if due_s - now_s > after_s / 4 else due_s + after_s
