"""The controller's own time: it stands still while the controller does not run.

Stopped by a signal or a cgroup's freezer, suspended with the machine, or left without CPU, the
controller hears nothing of its workers, and they may have stood still as well. That time is
nobody's delay. So what workers are given time for is measured with this clock: their watchdog,
how long they take nothing, getting ready, finishing.

A machine that is always late is something else: there the clock goes slower, but it goes on, or
nobody would ever be found to hang.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Handle

_BEAT_S = 0.5
_LIMIT_S = 4 * _BEAT_S
_REST_S = 2.0
"""So seldom it looks where nobody's time matters."""
_SOON_S = 0.001
"""Timers may be early by so much: the loop rounds."""


class _Loop(Protocol):
    """What of an event loop is used."""

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: object
    ) -> Handle: ...


def boottime_s() -> float:
    """With the time in which the machine was suspended (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Clock:
    """Looks at the time every so often. Where a look comes late by as much again, what passed
    since the last one is a gap. One that comes alone does not count, and everybody's time is to
    begin anew; of others so much counts as if the look had come in time.

    Args:
        read_s: the time that it is made from.

    Attributes:
        missed_s: for how long the controller did not run, in all.
        stops: how many gaps came alone.
        stopped_s: how long the last of them was.
    """

    def __init__(self, read_s: Callable[[], float] = boottime_s) -> None:
        self.read_s = read_s
        self._seen_s = read_s()
        self._beat_s, self._limit_s = _BEAT_S, _LIMIT_S
        self._alone_from_s = -math.inf
        self._look: Callable[[], float] | None = None
        self._timed: set[Timer] = set()
        self._rests_s = 0.0
        self._beat_due_s = math.inf
        self._next: Handle | None = None
        self.loop: _Loop
        self.missed_s = self.stopped_s = 0.0
        self.stops = 0

    def run(self, loop: AbstractEventLoop | _Loop, look: Callable[[], float] | None = None) -> None:
        """Look at the time every so often from here on.

        Args:
            look: called each time; in how many seconds it wants to be again. Longer than it
                takes to notice a gap only while nobody's time matters to it.
        """
        self.loop = loop
        self._look = look
        self._seen_s = self.read_s()
        self._beat()

    def measure(self, *limits_s: float) -> None:
        """Notice a gap in time for these limits; those that are 0 are none."""
        given_s = [limit_s for limit_s in limits_s if limit_s] or [_LIMIT_S]
        self._beat_s, self._limit_s = min(*given_s, _LIMIT_S) / 4, max(given_s)

    def now_s(self) -> float:
        """Seconds that the controller was there to see, from some point on."""
        read_s = self.read_s()
        passed_s = read_s - self._seen_s
        self._seen_s = read_s
        if passed_s > 2 * self._beat_s + self._rests_s:
            self._miss(passed_s)
        return read_s - self.missed_s

    def _miss(self, passed_s: float) -> None:
        before_s = self._seen_s - passed_s - self.missed_s
        if before_s >= self._alone_from_s:
            self.stops, self.stopped_s = self.stops + 1, passed_s
            self.missed_s += passed_s
        else:
            self.missed_s += passed_s - self._beat_s
        # Everybody has all of its time until then, so whoever hangs was found.
        self._alone_from_s = before_s + 2 * self._limit_s

    def call_later(self, after_s: float, callback: Callable[..., object], *args: object) -> Timer:
        """As the loop's, but `after_s` of this clock."""
        return Timer(self, after_s, lambda: callback(*args))

    def beat_within(self, within_s: float) -> None:
        """Look no later than that."""
        self.now_s()
        due_s = self.read_s() + within_s
        if self._next is not None and due_s < self._beat_due_s:
            self._next.cancel()
            self._beat_in(within_s)

    def timing(self, timer: Timer, is_timed: bool) -> None:
        """While somebody's time is taken no gap may pass unnoticed."""
        if is_timed:
            self._timed.add(timer)
            self.beat_within(self._beat_s)
        else:
            self._timed.discard(timer)

    def _beat(self) -> None:
        self.now_s()
        self._next = None
        wanted_s = self._beat_s if self._look is None else self._look()
        self._beat_in(min(wanted_s, self._beat_s) if self._timed else min(wanted_s, _REST_S))

    def _beat_in(self, after_s: float) -> None:
        self._rests_s = max(0.0, after_s - self._beat_s)
        self._beat_due_s = self.read_s() + after_s
        self._next = self.loop.call_later(after_s, self._beat)


class Timer:
    """A call to come; see `Clock.call_later`."""

    def __init__(self, clock: Clock, after_s: float, call: Callable[[], object]) -> None:
        self._clock = clock
        self._due_s = clock.now_s() + after_s
        self._call = call
        self._wait(after_s)
        clock.timing(self, True)

    def cancel(self) -> None:
        self._clock.timing(self, False)
        self._handle.cancel()

    def _wait(self, after_s: float) -> None:
        self._handle = self._clock.loop.call_later(after_s, self._on_time)

    def _on_time(self) -> None:
        left_s = self._due_s - self._clock.now_s()
        if left_s > _SOON_S:
            self._wait(left_s)
        else:
            self.cancel()
            self._call()
