"""Whether a worker is fine, at capacity, or hung. Pure.

A worker is judged by whether it takes what waits for it: connections in its accept queue, and
requests on connections that it has accepted. If it takes nothing but makes progress with the
connections it has, it is at capacity: others get its queue, and it may finish. If it takes nothing
and makes no progress, it is hung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

import msgspec


class Verdict(Enum):
    FINE = "fine"
    AT_CAPACITY = "at capacity"
    HUNG = "hung"


class Look(msgspec.Struct, frozen=True):
    """What one look at a worker's socket shows.

    Args:
        queued: connections, or bytes of datagrams, that wait.
        is_full: whether the queue has no room left.
        taken: connections that were selected and are not queued: the worker has taken them, or
            they are on their way or were lost. None if they are not counted.
        activity: a number that changes when the process does anything.
    """

    queued: int
    is_full: bool = False
    taken: int | None = None
    activity: int = 0


class Evidence(msgspec.Struct, frozen=True):
    """What a closer look at a worker shows; None stands for what cannot be seen.

    Args:
        cpu_s: CPU time of its processes so far.
        open: connections that it holds or that wait for it.
        connections: by inode of the connections that it holds, the bytes that wait to be read,
            and the bytes moved so far.
        awaits: whether it sleeps in its event loop or in accept(2), and so will take what comes
            next.
    """

    cpu_s: float = 0.0
    open: int | None = None
    connections: Mapping[int, tuple[int, int]] | None = None
    awaits: bool | None = None


_BUSY = 0.05
"""The share of a CPU from which a process computes. Heartbeats and timers take less."""


def is_busy(cpu_s: float, elapsed_s: float) -> bool:
    """Whether this is more CPU time than timers take."""
    return cpu_s > _BUSY * elapsed_s


class Rest:
    """How long a process has been at rest: it slept, and used no more CPU time than timers take.
    A single wake-up means nothing, as most servers run timers several times a second."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._at_s = self._cpu_s = 0.0

    def lasted_s(self, now_s: float, cpu_s: float, is_asleep: bool) -> float:
        """The time at rest until this look.

        Args:
            cpu_s: its CPU time so far.
            is_asleep: whether it sleeps now.
        """
        was_busy = is_busy(cpu_s - self._cpu_s, now_s - self._at_s)
        if self._since_s is None or was_busy or not is_asleep:
            self._since_s = now_s
        self._at_s, self._cpu_s = now_s, cpu_s
        return now_s - self._since_s


def computes(before: Evidence, now: Evidence, elapsed_s: float) -> bool:
    return is_busy(now.cpu_s - before.cpu_s, elapsed_s)


def serves(before: Evidence, now: Evidence) -> bool:
    """Whether it moved bytes on a connection, or closed one."""
    if before.connections is None or now.connections is None:
        return before.open is not None and now.open is not None and now.open < before.open
    return any(
        inode not in now.connections or now.connections[inode][1] != moved
        for inode, (_, moved) in before.connections.items()
    )


def starves(before: Evidence, now: Evidence) -> bool:
    """Whether bytes wait on a connection at both looks, and none were read."""
    if before.connections is None or now.connections is None:
        return False
    return any(
        unread and now.connections.get(inode, (0, 0))[0] >= unread
        for inode, (unread, _) in before.connections.items()
    )


def awaited(before: Evidence, now: Evidence) -> bool | None:
    """Whether it slept in its event loop at one of two looks; None if that cannot be seen. One
    look is not enough, as an event loop may have just woken up, or wait for a CPU."""
    if before.awaits or now.awaits:
        return True
    return None if before.awaits is None or now.awaits is None else False


def makes_progress(before: Evidence, now: Evidence, elapsed_s: float) -> bool:
    """Whether it holds connections and makes progress: it computes, moves bytes, closes
    connections, or sleeps in its event loop, and so leaves its queue alone by choice."""
    if _holds_none(before) and _holds_none(now):
        return False
    return bool(awaited(before, now)) or serves(before, now) or computes(before, now, elapsed_s)


def _holds_none(evidence: Evidence) -> bool:
    """Whether it holds no connection, as far as can be seen."""
    held = evidence.connections
    return evidence.open == 0 if held is None else not held


class StallDetector:
    """The history of one socket: how long connections wait while none is taken."""

    def __init__(self) -> None:
        self._last: Look | None = None
        self._most_taken = 0
        self._since_s = 0.0

    def stalled_s(self, now_s: float, look: Look) -> float:
        """How long the queue has not drained until this look."""
        if self._last is None or self._has_taken(self._last, look):
            self._since_s = now_s
        self._last = look
        self._most_taken = max(self._most_taken, look.taken or 0)
        return now_s - self._since_s

    def _has_taken(self, last: Look, look: Look) -> bool:
        if look.queued == 0 or look.queued < last.queued:
            return True
        if look.activity == last.activity:
            return False
        if look.taken is None or look.is_full:
            # It works, and nothing tells on what: the count of datagram bytes falls only by a
            # quarter of the buffer at a time, and connections to a full queue are dropped.
            return True
        # More than ever before, as the number that is on its way rises and falls.
        return look.taken > self._most_taken


class Growth:
    """How long connections have come while none has gone. This is cheap to look at, and tells
    when to look closer at a worker whose queue is empty."""

    def __init__(self) -> None:
        self._last = self._least = 0
        self._since_s: float | None = None

    def grew_s(self, now_s: float, open_now: int) -> float:
        """How long the number of connections has grown until now.

        Args:
            open_now: connections that it has.
        """
        if self._since_s is None:
            self._since_s = now_s
        if open_now < self._last or open_now <= self._least:
            self.restart(now_s, open_now)
        self._last = open_now
        return now_s - self._since_s

    def restart(self, now_s: float, open_now: int) -> None:
        self._last = self._least = open_now
        self._since_s = now_s


class History:
    """What was seen of one worker.

    Args:
        timeout_s: how long connections may wait while none is taken.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sockets: dict[int, StallDetector] = {}
        self._growth = Growth()
        self._before: tuple[float, Evidence] | None = None
        self._verdict = Verdict.FINE

    def judge(
        self,
        now_s: float,
        looks: Mapping[int, Look],
        open_now: int | None,
        look_closer: Callable[[], Evidence],
    ) -> Verdict:
        """The verdict after these looks.

        Args:
            looks: at its sockets, by bind.
            open_now: its connections; None if they are not counted.
            look_closer: takes a closer look. It is expensive, so only suspects get one.
        """
        waited_s = max(
            (self._detector(at).stalled_s(now_s, look) for at, look in looks.items()), default=0.0
        )
        grew_s = 0.0 if open_now is None else self._growth.grew_s(now_s, open_now)
        suspect_s = max(waited_s, grew_s)
        if suspect_s < self._timeout_s / 2:
            self._before = None
            self._verdict = Verdict.FINE
        elif self._before is None:
            self._before = now_s, look_closer()
            self._verdict = Verdict.FINE
        elif suspect_s >= self._timeout_s and now_s - self._before[0] >= self._timeout_s / 8:
            in_queue = waited_s >= self._timeout_s
            self._verdict = self._compare(now_s, look_closer(), in_queue)
            if self._verdict is Verdict.FINE:
                self._growth.restart(now_s, open_now or 0)
        return self._verdict

    def judge_at_capacity(self, now_s: float, look_closer: Callable[[], Evidence]) -> Verdict:
        """The verdict on a worker that is at capacity: whether it still makes progress."""
        if self._before is None:
            self._before = now_s, look_closer()
        elif now_s - self._before[0] >= self._timeout_s:
            self._verdict = self._compare(now_s, look_closer(), in_queue=True)
        return self._verdict

    def _compare(self, now_s: float, now: Evidence, in_queue: bool) -> Verdict:
        assert self._before is not None
        (before_s, before), self._before = self._before, (now_s, now)
        elapsed_s = now_s - before_s
        if in_queue:
            return Verdict.AT_CAPACITY if makes_progress(before, now, elapsed_s) else Verdict.HUNG
        if awaited(before, now) is not False or serves(before, now) or not starves(before, now):
            return Verdict.FINE
        return Verdict.AT_CAPACITY if computes(before, now, elapsed_s) else Verdict.HUNG

    def _detector(self, at: int) -> StallDetector:
        return self._sockets.setdefault(at, StallDetector())
