"""Listeners that could not become members: why, and when to try them again. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

from steer.errors import KernelError, Note
from steer.values import plural, several

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _DOUBLINGS = 0.1, 10.0, 10
_TOLD_AFTER = 2
"""A listener that fails once may just have been closed."""


HIDDEN = Note("no process can be seen that has it open", "run as root, in the pid namespace of all")
_MOST_PIDS = 4


def unshared(errno: int) -> KernelError:
    """A listener without SO_REUSEPORT."""
    cure = "set SO_REUSEPORT in the server"
    return KernelError("add a listener", "it is without SO_REUSEPORT", cure, errno=errno)


def in_another_array(errno: int) -> KernelError:
    """A listener that another program selects."""
    cause = "it is in the socket array of another program"
    return KernelError("add a listener", cause, "`steer inspect` shows whose", errno=errno)


class Refusal(msgspec.Struct):
    """Of one listener.

    Args:
        why: the last time.
        failures: how often it was tried.
        again_s: when to try again; of time.monotonic().
        pids: processes that have it open.
    """

    why: Note
    failures: int
    again_s: float
    pids: Sequence[int]


class Refusals:
    """By inode."""

    def __init__(self) -> None:
        self._refusals: dict[int, Refusal] = {}
        self._told: set[Note] = set()

    def __len__(self) -> int:
        return len(self._refusals)

    def is_due(self, inode: int, now_s: float) -> bool:
        """Whether it may be tried: it never failed, or its pause is over."""
        refusal = self._refusals.get(inode)
        return refusal is None or now_s >= refusal.again_s

    def add(self, inode: int, why: Note, pids: Sequence[int], now_s: float) -> None:
        """It failed. The pause doubles each time."""
        before = self._refusals.get(inode)
        failures = before.failures + 1 if before else 1
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(failures - 1, _DOUBLINGS), _LONGEST_PAUSE_S)
        self._refusals[inode] = Refusal(why, failures, now_s + pause_s, pids)

    def remove(self, inode: int) -> None:
        """It succeeded."""
        self._refusals.pop(inode, None)

    def keep(self, there: Container[int]) -> None:
        """Forget those that are closed."""
        self._refusals = {k: each for k, each in self._refusals.items() if k in there}

    @property
    def next_s(self) -> float | None:
        """When the next one is due; None if there is none."""
        return min((each.again_s for each in self._refusals.values()), default=None)

    def by_reason(self) -> dict[Note, list[Refusal]]:
        """Those that have failed more than once."""
        found: dict[Note, list[Refusal]] = {}
        for each in self._refusals.values():
            if each.failures >= _TOLD_AFTER:
                found.setdefault(each.why, []).append(each)
        return found

    def untold(self) -> dict[Note, list[Refusal]]:
        """The reasons that were not returned since they last arose."""
        now = self.by_reason()
        fresh = {why: each for why, each in now.items() if why not in self._told}
        self._told = set(now)
        return fresh


def in_words(why: Note, refused: Sequence[Refusal]) -> str:
    """A reason, with the listeners it is the reason for."""
    count = plural(len(refused), "listener")
    pids = sorted({pid for each in refused for pid in each.pids})[:_MOST_PIDS]
    whose = f" ({several('pid', pids)})" if pids else ""
    verb = "is" if len(refused) == 1 else "are"
    return f"{count}{whose} {verb} not selected: {why}"


def full_in_words(capacity: int, without: int) -> str:
    """What is said if there are more listeners than slots."""
    more = f"{plural(without, 'listener')} more {'gets' if without == 1 else 'get'} no connections"
    cure = "`steer detach` and attach again to have slots for all"
    return f"all {capacity} slots are taken, and {more}; {cure}"
