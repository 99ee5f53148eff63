"""Looks for listeners that open and close: when a program reports one, and from time to time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from steer.attach.binds import text_of
from steer.attach.group import AttachedGroup
from steer.linux.retry import Retry

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, TimerHandle

_REST = 3
"""How long to rest after a look, in terms of how long it took. A server that opens many listeners
one after the other costs a quarter of a CPU at most, and requests are still answered."""
_CHECKED_S, _FIRST_CHECKED_S = 10.0, 1.0
"""How often to check that the group has our program. The first check loads a program, which takes
10 ms: it comes early, so that a detach need not."""
_WATCHED_S, _UNWATCHED_S, _STARTING_S = 1.0, 0.05, 0.01
"""How often to look for listeners: if programs report them, if none does, and while a process does
not wait on a new one yet."""


class Looking:
    """Keeps a group up to date from `begin` to `end`."""

    def __init__(self, loop: AbstractEventLoop, group: AttachedGroup, retry: Retry) -> None:
        self._loop = loop
        self._group = group
        self._where = text_of(group.bind)
        self._retry = retry
        self._look_again: TimerHandle | None = None
        self._check_again: TimerHandle | None = None
        self._heard_fd: int | None = None
        self._heard_s = -math.inf
        self._rested_s = 0.0

    def begin(self) -> None:
        self._hear()
        self._look()
        self._check_later(_FIRST_CHECKED_S)

    def end(self) -> None:
        for timer in (self._look_again, self._check_again):
            if timer is not None:
                timer.cancel()
        self._stop_hearing()

    def _check_later(self, after_s: float) -> None:
        self._check_again = self._loop.call_later(after_s, self._check_program)

    def _check_program(self) -> None:
        self._retry.attempt(f"check the program of {self._where}", self._group.check_program)
        self._check_later(_CHECKED_S)

    def _hear(self) -> None:
        if self._group.joining.watch is not None:
            self._heard_fd = self._group.joining.watch.events.fileno()
            self._loop.add_reader(self._heard_fd, self._heard)

    def _stop_hearing(self) -> None:
        if self._heard_fd is not None:
            self._loop.remove_reader(self._heard_fd)
            self._heard_fd = None

    def _heard(self) -> None:
        if self._group.joining.watch is not None:
            self._group.joining.watch.events.skip()
            # A listener is reported a moment before it can be found, so look again soon.
            self._heard_s = time.monotonic()
            self._look_in(0.0)

    def _look(self) -> None:
        began_s = time.monotonic()
        self._retry.attempt(f"look for sockets at {self._where}", self._group.look)
        if self._group.joining.watch is None:
            self._stop_hearing()
        ended_s = time.monotonic()
        self._rested_s = ended_s + _REST * (ended_s - began_s)
        self._look_in(self._pause_s())

    def _look_in(self, pause_s: float) -> None:
        """Look again after a pause, which is longer if the last look took long."""
        if self._look_again is not None:
            self._look_again.cancel()
        rest_s = self._rested_s - time.monotonic()
        self._look_again = self._loop.call_later(max(pause_s, rest_s), self._look)

    def _pause_s(self) -> float:
        """Until the next look."""
        now_s, joining = time.monotonic(), self._group.joining
        is_starting = self._group.roster.starting or joining.has_new_room
        if is_starting or now_s < self._heard_s + _STARTING_S:
            return _STARTING_S
        usual_s = _WATCHED_S if joining.watch is not None else _UNWATCHED_S
        due_s = joining.refusals.next_s
        return usual_s if due_s is None else max(_STARTING_S, min(usual_s, due_s - now_s))
