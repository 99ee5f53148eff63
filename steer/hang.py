"""When a worker hangs: connections wait for it, and it takes none. Pure.

Not whether it answers, nor whether it computes: a worker that is busy for a minute with one
request has no fault, and others should have what waits for it meanwhile all the same.
"""

from __future__ import annotations

import msgspec


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


class Patience:
    """One socket's history.

    Args:
        timeout_s: how long something may wait while nothing is taken.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._last: Look | None = None
        self._most_taken = 0
        self._since_s = 0.0

    def is_over(self, now_s: float, look: Look) -> bool:
        """Whether with this look it has lasted too long."""
        if self._last is None or self._has_taken(self._last, look):
            self._since_s = now_s
        self._last = look
        self._most_taken = max(self._most_taken, look.taken or 0)
        return now_s - self._since_s >= self._timeout_s

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
