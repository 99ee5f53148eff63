"""Decides whether a worker's socket has left its group, and what to do then. Pure.

Workers can do anything with their sockets. Some system calls take a socket out of its group: then
it gets nothing more or, over UDP, everything. After other calls the kernel finds the socket without
asking the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import msgspec


class Sighting(msgspec.Struct, frozen=True):
    """What is known of a socket; None if something is not known.

    Args:
        is_open: the worker has it open, and over TCP it listens.
        is_connected: over UDP, it is connected to a peer.
        is_on_device: it is bound to a network interface, and new sockets are not.
        is_member: it is in its group in the kernel.
        shares: it has SO_REUSEPORT.
    """

    is_open: bool | None = None
    is_connected: bool | None = None
    is_on_device: bool | None = None
    is_member: bool | None = None
    shares: bool | None = None


class Cure(Enum):
    SHARE = "SO_REUSEPORT was set again"
    REJOIN = "it was put back"
    REPLACE = "the worker is replaced"
    TELL = "the worker is not replaced, as a new socket would get all datagrams; use `steer reload`"


class Departure(Enum):
    """Why a socket has left its group, in words that follow "left the group: "."""

    CLOSED = "the worker closed it, or does not listen on it any more"
    CONNECTED = "it was connected to a peer after steer bound it"
    ON_DEVICE = "it was bound to a device after steer bound it"
    DISSOLVED = "it was connected to a peer or bound to a device for a while"
    RELISTENS = "it was shut down, and listens again"
    ALONE = "SO_REUSEPORT was set to 0"


def cure(found: Departure, splits: bool) -> Cure:
    """What to do about a departure. No system call puts a bound UDP socket into a group, so mostly
    the worker has to be replaced.

    Args:
        splits: a socket that is bound now would form a group of its own with a connected one, and
            get all new clients.
    """
    if found is Departure.CONNECTED and splits:
        return Cure.TELL
    return _CURES.get(found, Cure.REPLACE)


_CURES = {Departure.RELISTENS: Cure.REJOIN, Departure.ALONE: Cure.SHARE}


def departure(protocol: str, seen: Sighting) -> Departure | None:
    """Why a socket has left its group; None if it has not, as far as is known.

    Args:
        protocol: "tcp" or "udp".
    """
    if seen.is_open is False:
        return Departure.CLOSED
    if seen.is_connected:
        return Departure.CONNECTED
    if seen.is_on_device:
        return Departure.ON_DEVICE
    if seen.is_member is False:
        return Departure.RELISTENS if protocol == "tcp" else Departure.DISSOLVED
    if seen.shares is False:
        return Departure.ALONE
    return None


_AFTER_S = (0.0, 2.0, 10.0)
"""How long after the previous replacement the next may begin; there are no more than these."""
_FORGOTTEN_S = 600.0


class Tries:
    """Limits replacements in one slot, because a worker may leave its group each time it starts."""

    def __init__(self) -> None:
        self._begun_s: list[float] = []

    def begin(self, now_s: float) -> bool:
        """Whether a replacement may begin now. If so it is recorded."""
        self._begun_s = [each for each in self._begun_s if now_s - each < _FORGOTTEN_S]
        times = len(self._begun_s)
        if self.are_over or (times and now_s - self._begun_s[-1] < _AFTER_S[times]):
            return False
        self._begun_s.append(now_s)
        return True

    @property
    def are_over(self) -> bool:
        return len(self._begun_s) >= len(_AFTER_S)


class Advice(Enum):
    NOTHING = "no problem is seen"
    ATTACH = "attach the program again, which is harmless while it selects no socket"
    TELL = "attach the program again, and log it: it selects no socket, and sockets get connections"


_IDLE_LOOKS, _ARRIVALS = 4, 3
"""One arrival proves nothing: a connection may arrive long after the program ran for its SYN."""


class Bypass:
    """Detects that the kernel does not run the program of a group.

    The kernel does not say which program a group has. But steer's programs count selections. If
    that count stays the same while queues grow or connections are opened, the program did not run.
    """

    def __init__(self) -> None:
        self._selections = -1
        self._waiting: Mapping[int, int] = {}
        self._looks = self._arrivals = 0

    def look(self, selections: int, waiting: Mapping[int, int]) -> Advice:
        """What to do.

        Args:
            selections: selections by the program so far.
            waiting: for each socket, by inode: its open connections, or the length of its queue.
        """
        before = self._waiting
        has_more = any(now > before.get(inode, now) for inode, now in waiting.items())
        self._waiting = waiting
        if selections != self._selections:
            self._selections, self._looks, self._arrivals = selections, 0, 0
            return Advice.NOTHING
        self._looks += 1
        self._arrivals += has_more
        if self._arrivals == _ARRIVALS:
            self._looks = self._arrivals = 0
            return Advice.TELL
        return Advice.NOTHING if self._looks % _IDLE_LOOKS else Advice.ATTACH
