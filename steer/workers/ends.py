"""Noticing that workers have ended, for many workers at once: one search for remaining processes
serves all workers whose first processes ended at the same time.

When the first process of a worker has ended, its other processes are told to end, as a shell does
not forward signals. If the worker was told to finish, steer waits for them; otherwise they are
left behind.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec

from steer.linux import family
from steer.linux.family import Family
from steer.linux.retry import Retry
from steer.workers.handle import WorkerHandle
from steer.workers.process import WorkerProcess

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Handle

T = TypeVar("T")
MOST = 16
"""The most workers in one step, so that the loop can do other things in between."""
_LOOK_AGAIN_S = 0.05
_MOST_LOOKING = 0.05
"""The share of time for searching the remaining processes of one worker."""
_REST, _REST_MOST_S = 10, 0.02
"""The pause after a search is so many times as long as the search, up to a limit."""
_SELDOM_S = 1.0
"""The time between searches if the kernel tells us when a process ends."""

Find = Callable[[Sequence[Family], Collection[int]], list[list[int]]]
"""See `family.others`."""


class End(msgspec.Struct, eq=False):
    """The end of one worker's first process.

    Args:
        others: its other processes, at the last search.
        not_before_s: the earliest time of the next search.
        look_s: the time of the next search, unless a process ends before.
        is_lost: whether it was reported that others are still running.
        status: see `WorkerProcess.let_go`.
    """

    worker: WorkerHandle
    process: WorkerProcess
    others: Sequence[int] = ()
    not_before_s: float = 0.0
    look_s: float = 0.0
    is_lost: bool = False
    status: int | None = None


class Ends:
    """The ends of all workers of a service.

    Args:
        first: called as soon as the first process of a worker has ended.
        lost: called with workers that were told to finish, whose first process has ended, and
            whose other processes have not ended soon after.
        ended: called once for each worker when no process is left that is waited for.
        find: see `family.others`.
        before: called with the same workers as `ended`, before their process ids can be reused.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        retry: Retry,
        first: Callable[[WorkerHandle], None],
        lost: Callable[[Sequence[End]], None],
        ended: Callable[[Sequence[End]], None],
        find: Find = family.others,
        before: Callable[[Sequence[WorkerProcess]], None] = lambda _: None,
    ) -> None:
        self._loop = loop
        self._retry = retry
        self._on_first = first
        self._on_lost = lost
        self._on_ended = ended
        self._on_before = before
        self._find = find
        self._groups: set[int] = set()
        self._killed: deque[WorkerProcess] = deque()
        self._fresh: deque[End] = deque()
        self._again: deque[End] = deque()
        self._waiting: set[End] = set()
        self._whose: dict[int, End] = {}
        self._rest_until_s = 0.0
        self._step_due: Handle | None = None
        self._tick_due: Handle | None = None

    def watch(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Notice the end of this process."""
        self._groups.add(process.pid)
        process.watch(self._loop, partial(self._first_has_ended, End(worker, process)))

    def forget(self, process: WorkerProcess) -> None:
        """Ignore the end of this process."""
        self._groups.discard(process.pid)

    def kill(self, process: WorkerProcess) -> None:
        """Kill all processes of a worker. Those that have left its process group are found by the
        next step."""
        process.kill_group()
        self._killed.append(process)
        self._step_soon()

    def reaped(self, pids: Iterable[int]) -> None:
        """These processes have ended, which we had inherited as children."""
        for end in {self._whose[pid] for pid in pids if pid in self._whose}:
            end.look_s = min(end.look_s, end.not_before_s)
        self._look_at_due()

    def _first_has_ended(self, end: End) -> None:
        act = f"replace worker {end.worker.slot} by a spare"
        self._retry.attempt(act, partial(self._on_first, end.worker))
        self._fresh.append(end)
        self._step_soon()

    # Steps.

    def _step_soon(self) -> None:
        """Take a step when all ends of this turn of the loop were noticed."""
        if self._step_due is None:
            self._step_due = self._loop.call_soon(self._step_in_time)

    def _step_in_time(self) -> None:
        """Wait a little if few have ended, as one search may serve more that end meanwhile."""
        rest_s = self._rest_until_s - self._loop.time()
        if rest_s > 0 and max(len(self._killed), len(self._fresh), len(self._again)) < MOST:
            self._step_due = self._loop.call_later(rest_s, self._step)
        else:
            self._step()

    def _step(self) -> None:
        self._step_due = None
        # Killed workers come first, or their other processes would be told to finish.
        if self._killed:
            act, step = "kill all of workers", partial(self._kill_others, _some(self._killed))
        elif self._fresh:
            act, step = "see the ends of workers", partial(self._see, _some(self._fresh))
        else:
            act, step = "see what is left of workers", partial(self._see_again, _some(self._again))
        if self._killed or self._fresh or self._again:
            self._step_soon()
        self._retry.until_done(act, step)

    def _kill_others(self, gone: Sequence[WorkerProcess]) -> None:
        still_open = [each for each in gone if each.is_open]
        for pids in self._others(still_open):
            family.send(signal.SIGKILL, pids)

    def _see(self, ends: Sequence[End]) -> None:
        still_open = [each for each in ends if each.process.is_open and each not in self._waiting]
        try:
            found = self._others([each.process for each in still_open])
        except OSError:
            # Nobody waits for unseen processes of workers that were killed.
            killed = [each for each in still_open if each.process.is_killed]
            self._decide(killed, [[] for _ in killed])
            if len(killed) == len(still_open):
                return
            self._lose(each for each in still_open if not each.process.is_killed)
            raise
        self._decide(still_open, found)

    def _decide(self, ends: Sequence[End], found: Sequence[Sequence[int]]) -> None:
        """Wait for other processes only if their worker was told to finish."""
        over: list[End] = []
        look_s = self._loop.time() + _LOOK_AGAIN_S
        for end, others in zip(ends, found, strict=True):
            end.process.signal_others(others)
            if end.process.told_to_finish and others:
                self._wait(end, others, look_s, look_s)
            else:
                end.process.left_behind = others
                over.append(end)
        self._end(over)
        self._tick_soon()

    def _see_again(self, ends: Sequence[End]) -> None:
        # A worker may be queued twice if its processes end one after another.
        waiting = [each for each in dict.fromkeys(ends) if each in self._waiting]
        began_s = time.monotonic()
        try:
            found = self._others([each.process for each in waiting])
        except OSError:
            if not all(each.process.is_killed for each in waiting):
                raise
            found = [[] for _ in waiting]
        took_s = (time.monotonic() - began_s) / max(1, len(waiting))
        now_s = self._loop.time()
        for end, others in zip(waiting, found, strict=True):
            not_before_s = now_s + look_again_s(took_s)
            seldom_s = now_s + _SELDOM_S if end.process.family.is_child else not_before_s
            self._wait(end, others, not_before_s, max(not_before_s, seldom_s))
        self._lose(end for end in waiting if end.others)
        self._end([end for end in waiting if not end.others])
        self._tick_soon()

    def _others(self, gone: Sequence[WorkerProcess]) -> list[list[int]]:
        began_s = self._loop.time()
        found = self._find([each.family for each in gone], self._groups)
        now_s = self._loop.time()
        self._rest_until_s = now_s + min(_REST_MOST_S, _REST * (now_s - began_s))
        return found

    def _lose(self, ends: Iterable[End]) -> None:
        fresh = [each for each in ends if not each.is_lost]
        if fresh:
            self._on_lost(fresh)
        for each in fresh:
            each.is_lost = True

    def _wait(self, end: End, others: Sequence[int], not_before_s: float, look_s: float) -> None:
        self._forget(end)
        end.others, end.not_before_s, end.look_s = others, not_before_s, look_s
        self._waiting.add(end)
        self._whose.update(dict.fromkeys(others, end))

    def _forget(self, end: End) -> None:
        self._waiting.discard(end)
        for pid in end.others:
            self._whose.pop(pid, None)

    def _end(self, ends: Sequence[End]) -> None:
        if ends:
            tell = partial(self._on_before, [each.process for each in ends])
            self._retry.attempt("let go of workers", tell)
        for end in ends:
            self._forget(end)
            self._groups.discard(end.process.pid)
            act, unknown = f"see the end of worker {end.worker.slot}", None
            end.status = self._retry.result(act, end.process.let_go, unknown)
        if ends:
            self._on_ended(ends)

    # Time.

    def _tick_soon(self) -> None:
        if self._waiting and self._tick_due is None:
            self._tick_due = self._loop.call_later(_LOOK_AGAIN_S, self._tick)

    def _tick(self) -> None:
        self._tick_due = None
        self._look_at_due()
        self._tick_soon()

    def _look_at_due(self) -> None:
        now_s = self._loop.time()
        due = [each for each in self._waiting if each.look_s <= now_s]
        for each in due:
            each.look_s = math.inf
        self._again.extend(due)
        if due:
            self._step_soon()


def _some(queue: deque[T]) -> list[T]:
    """Remove as many from the queue as one step handles."""
    return [queue.popleft() for _ in range(min(MOST, len(queue)))]


def look_again_s(took_s: float) -> float:
    """The time until the next search for remaining processes, of which there may be hundreds.

    Args:
        took_s: the duration of the last search.
    """
    return max(_LOOK_AGAIN_S, took_s / _MOST_LOOKING)
