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
        taken: how many the worker has taken so far, but for what never arrived; None where
            nobody counts.
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
        self._since_s = 0.0

    def is_over(self, now_s: float, look: Look) -> bool:
        """Whether with this look it has lasted too long."""
        if self._last is None or _has_taken(self._last, look):
            self._since_s = now_s
        self._last = look
        return now_s - self._since_s >= self._timeout_s


def _has_taken(last: Look, look: Look) -> bool:
    if look.queued == 0 or look.queued < last.queued:
        return True
    if look.is_full:
        # What does not fit is chosen and dropped, so the count grows for nothing; and a queue
        # filled up as fast as it is emptied is that of a worker at work.
        return look.activity != last.activity
    return look.taken is not None and look.taken != last.taken
