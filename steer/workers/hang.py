"""What a worker is: fine, at capacity, or hung. Pure.

Not whether it answers is judged, nor whether it computes, but whether it takes what waits for it:
connections in its queue, and requests on those that it has accepted. One that takes none, but
holds connections and gets on with them, is at capacity: others are to have what waits for it, and
it is let finish. One that takes none and does not get on is hung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

import msgspec


class Verdict(Enum):
    FINE = "fine"
    FULL = "at capacity"
    HUNG = "hung"


class Look(msgspec.Struct, frozen=True):
    """What one look at a worker's socket shows.

    Args:
        queued: connections, or bytes of datagrams, that wait.
        is_full: whether there is room for no more.
        taken: how many the worker has taken so far, and how many are on their way to it or
            never arrived; None where nobody counts.
        activity: changes when the process does anything.
    """

    queued: int
    is_full: bool = False
    taken: int | None = None
    activity: int = 0


class Evidence(msgspec.Struct, frozen=True):
    """What a closer look at a worker shows; None where it cannot be seen.

    Args:
        cpu_s: CPU time of its processes so far.
        open: connections that it holds or that wait for it.
        connections: of those that it holds, by inode: bytes that wait to be read, and bytes
            moved so far.
        awaits: whether it is asleep in its event loop or in accept(2), and so takes the next thing
            that happens.
    """

    cpu_s: float = 0.0
    open: int | None = None
    connections: Mapping[int, tuple[int, int]] | None = None
    awaits: bool | None = None


_BUSY = 0.05
"""Of a CPU; less is what heartbeats and timers take."""


def is_busy(cpu_s: float, elapsed_s: float) -> bool:
    """Whether so much CPU time is more than it takes to look at a clock now and then."""
    return cpu_s > _BUSY * elapsed_s


class Rest:
    """For how long a process has been at rest: asleep, but for what timers take. Most servers
    look at a clock or at a file several times in a second, so that one wakes means nothing."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._at_s = self._cpu_s = 0.0

    def lasted_s(self, now_s: float, cpu_s: float, is_asleep: bool) -> float:
        """Until this look.

        Args:
            cpu_s: CPU time of it so far.
            is_asleep: whether it slept when it was looked at.
        """
        was_busy = is_busy(cpu_s - self._cpu_s, now_s - self._at_s)
        if self._since_s is None or was_busy or not is_asleep:
            self._since_s = now_s
        self._at_s, self._cpu_s = now_s, cpu_s
        return now_s - self._since_s


def computes(before: Evidence, now: Evidence, elapsed_s: float) -> bool:
    return is_busy(now.cpu_s - before.cpu_s, elapsed_s)


def serves(before: Evidence, now: Evidence) -> bool:
    """Whether it moved anything on a connection, or closed one."""
    if before.connections is None or now.connections is None:
        return before.open is not None and now.open is not None and now.open < before.open
    return any(
        inode not in now.connections or now.connections[inode][1] != moved
        for inode, (_, moved) in before.connections.items()
    )


def starves(before: Evidence, now: Evidence) -> bool:
    """Whether bytes wait on a connection all the time, and none are read."""
    if before.connections is None or now.connections is None:
        return False
    return any(
        unread and now.connections.get(inode, (0, 0))[0] >= unread
        for inode, (unread, _) in before.connections.items()
    )


def awaited(before: Evidence, now: Evidence) -> bool | None:
    """Whether it was asleep in its event loop at one look or the other; None if that cannot be
    seen. One look is not enough: an event loop wakes up now and then, and may wait for a CPU."""
    if before.awaits or now.awaits:
        return True
    return None if before.awaits is None or now.awaits is None else False


def gets_on(before: Evidence, now: Evidence, elapsed_s: float) -> bool:
    """Whether it holds connections and gets on with them: computes, moves, closes, or is asleep
    in its event loop, and so turns to others by its own choice."""
    if _holds_none(before) and _holds_none(now):
        return False
    return bool(awaited(before, now)) or serves(before, now) or computes(before, now, elapsed_s)


def _holds_none(evidence: Evidence) -> bool:
    """As far as can be seen."""
    held = evidence.connections
    return evidence.open == 0 if held is None else not held


class Patience:
    """One socket's history: for how long something waits while nothing is taken."""

    def __init__(self) -> None:
        self._last: Look | None = None
        self._most_taken = 0
        self._since_s = 0.0

    def waited_s(self, now_s: float, look: Look) -> float:
        """Until this look."""
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
            # It is at work, and nobody can tell on what: the bytes of datagrams fall by a
            # quarter of the buffer at a time, and who is chosen for a full queue is dropped.
            return True
        # More than ever before: what is on its way goes up and down.
        return look.taken > self._most_taken


class Growth:
    """For how long connections have come and none has gone. Costs nothing to look at, and so
    tells when to look closer at a worker that has no queue."""

    def __init__(self) -> None:
        self._last = self._least = 0
        self._since_s: float | None = None

    def grew_s(self, now_s: float, open_now: int) -> float:
        """Until now.

        Args:
            open_now: connections.
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
    """One worker's.

    Args:
        timeout_s: how long something may wait while nothing is taken.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sockets: dict[int, Patience] = {}
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
        """What it is with these looks.

        Args:
            looks: at its sockets, by bind.
            open_now: connections; None where they are not counted.
            look_closer: is dear, so asked only of one that is suspect.
        """
        waited_s = max(
            (self._patience(at).waited_s(now_s, look) for at, look in looks.items()), default=0.0
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

    def judge_full(self, now_s: float, look_closer: Callable[[], Evidence]) -> Verdict:
        """Whether one that is at capacity still gets on."""
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
            return Verdict.FULL if gets_on(before, now, elapsed_s) else Verdict.HUNG
        if awaited(before, now) is not False or serves(before, now) or not starves(before, now):
            return Verdict.FINE
        return Verdict.FULL if computes(before, now, elapsed_s) else Verdict.HUNG

    def _patience(self, at: int) -> Patience:
        return self._sockets.setdefault(at, Patience())
