"""Sockets that could not become members: why, and when to try them again. Pure."""

from __future__ import annotations

import errno
from collections.abc import Callable, Container, Mapping, Sequence

import msgspec

from steer.attach.wording import Wording
from steer.errors import KernelError, Note
from steer.values import plural, several

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _DOUBLINGS = 0.1, 10.0, 10
_TOLD_AFTER = 2
"""A socket that fails once may just have been closed."""

HIDDEN = Note("no process can be seen that has it open", "run as root, in the pid namespace of all")
_MOST_PIDS = 4


LEFT = "was connected or bound to an interface once"
"""What makes a UDP socket leave its group, see reuseport_detach_sock() of the kernel's callers."""


_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def is_short(error: KernelError) -> bool:
    """Whether the machine lacks something that it may have later."""
    return error.errno in _SHORT


def unshared(number: int) -> KernelError:
    """A socket without SO_REUSEPORT."""
    cure = "set SO_REUSEPORT in the server"
    return KernelError("add a socket", "it is without SO_REUSEPORT", cure, errno=number)


def in_another_array(number: int) -> KernelError:
    """A socket that another program selects."""
    cause = "it is in the sockarray or sockmap of another program"
    cure = "`steer inspect` shows whose; if in a sockmap, start steer again"
    return KernelError("add a socket", cause, cure, errno=number)


def in_no_group(number: int) -> KernelError:
    """A socket that is closed, or left its group for good."""
    cause = f"it is in no reuseport group: it is closed, or {LEFT}"
    return KernelError("add a socket", cause, "restart its process", errno=number)


BY_ERRNO: Mapping[int, Callable[[int], KernelError]] = {
    errno.EBUSY: in_another_array,
    errno.EINVAL: in_no_group,
}
"""What the kernel means if it does not put a socket into a sockarray."""


class Refusal(msgspec.Struct):
    """Of one socket.

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


def in_words(why: Note, refused: Sequence[Refusal], wording: Wording) -> str:
    """A reason, with the sockets it is the reason for."""
    count = plural(len(refused), wording.socket)
    pids = sorted({pid for each in refused for pid in each.pids})[:_MOST_PIDS]
    whose = f" ({several('pid', pids)})" if pids else ""
    verb = "is" if len(refused) == 1 else "are"
    return f"{count}{whose} {verb} not selected: {why}"


def full_in_words(capacity: int, without: int, wording: Wording) -> str:
    """What is said if there are more sockets than slots."""
    verb = "gets" if without == 1 else "get"
    more = f"{plural(without, wording.socket)} more {verb} no {wording.traffic}"
    cure = "start steer again to have slots for all"
    return f"all {capacity} slots are taken, and {more}; {cure}"
