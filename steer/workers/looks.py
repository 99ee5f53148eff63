"""All that is looked at again and again, in one timer: each time the controller wakes costs more
than most looks do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer.linux.retry import Retry
    from steer.workers.clock import Clock

TOGETHER_S = 0.05
"""Looks that are due so soon after one another are one."""
_STEP_S = 0.005
"""After so long those that are still due have the next turn of the loop."""
_AGAIN_S = 1.0


class Look:
    """One of them.

    Args:
        look: looks, and returns in how many seconds it is to be called again.
    """

    def __init__(self, looks: Looks, act: str, look: Callable[[], float]) -> None:
        self.act = act
        self.look = look
        self.due_s = 0.0
        self._looks = looks

    def within(self, seconds: float) -> None:
        """Be called no later."""
        self._looks.take_within(self, seconds)


class Looks:
    """Args: clock: whose beats they are taken at."""

    def __init__(self, clock: Clock, retry: Retry) -> None:
        self._clock = clock
        self._retry = retry
        self._looks: list[Look] = []

    def add(self, act: str, look: Callable[[], float], after_s: float) -> Look:
        """Args: act: in words, for the log. after_s: until the first."""
        added = Look(self, act, look)
        added.due_s = self._clock.read_s() + after_s
        self._looks.append(added)
        return added

    def take(self) -> float:
        """Those that are due, as far as there is time; in how many seconds the next is."""
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
    """When `after_s` are over, or somewhat before or after: what is done as often as something
    else is done together with it."""
    if not after_s or math.isinf(after_s):
        return now_s + after_s
    beats = math.floor((now_s + TOGETHER_S) / after_s) + 1
    due_s = beats * after_s
    return due_s if due_s - now_s > after_s / 4 else due_s + after_s
