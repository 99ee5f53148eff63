"""The controller's own time, which stands still while the controller does not run.

The controller may be stopped by a signal or a cgroup's freezer, suspended with the machine, or left
without CPU. It receives nothing from its workers then, and they may not run either, so that time
must not count against them. All timeouts of workers are measured with this clock: the watchdog,
hangs, becoming ready, finishing.

On a machine that is always late the clock goes slower, but it goes on. Otherwise no worker would
ever be found hung.
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
"""The longest time between looks while no timeout runs."""
_SOON_S = 0.001
"""Timers may be early by this much, as the event loop rounds."""


class _Loop(Protocol):
    """What of an event loop is used."""

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: object
    ) -> Handle: ...


def boottime_s() -> float:
    """A time that includes suspension of the machine (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Clock:
    """Reads the time at regular beats. If a beat comes late by another beat or more, the time
    since the last one is a gap. A gap that comes alone does not count at all, and all timeouts
    are to begin again. A gap that follows another soon counts as one beat.

    Args:
        read_s: returns the time from which this clock is derived.

    Attributes:
        missed_s: the time that did not count, in all.
        stops: the number of gaps that came alone.
        stopped_s: the length of the last of them.
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
        """Read the time at every beat from here on.

        Args:
            look: called at each beat; returns the seconds until it wants to be called again. This
                may exceed a beat only while it measures no timeout.
        """
        self.loop = loop
        self._look = look
        self._seen_s = self.read_s()
        self._beat()

    def measure(self, *limits_s: float) -> None:
        """Notice gaps early enough for these timeouts; 0 stands for none."""
        given_s = [limit_s for limit_s in limits_s if limit_s] or [_LIMIT_S]
        self._beat_s, self._limit_s = min(*given_s, _LIMIT_S) / 4, max(given_s)

    def now_s(self) -> float:
        """Seconds in which the controller ran, from an arbitrary start."""
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
        # A whole timeout fits in until then, so that hung workers are found between gaps.
        self._alone_from_s = before_s + 2 * self._limit_s

    def call_later(self, after_s: float, callback: Callable[..., object], *args: object) -> Timer:
        """Call it after `after_s` of this clock."""
        return Timer(self, after_s, lambda: callback(*args))

    def beat_within(self, within_s: float) -> None:
        """Have the next beat within this time."""
        self.now_s()
        due_s = self.read_s() + within_s
        if self._next is not None and due_s < self._beat_due_s:
            self._next.cancel()
            self._beat_in(within_s)

    def timing(self, timer: Timer, is_timed: bool) -> None:
        """While a timer runs, beat often enough to notice every gap."""
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
    """A scheduled call; see `Clock.call_later`."""

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
