"""Whether a worker's socket is in its group as it was when it joined, and what to do. Pure.

A worker has its sockets to itself. Some calls take one out of its group, and it gets nothing more
or, over UDP, everything; others leave it there but have the kernel go past the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import msgspec


class Sighting(msgspec.Struct, frozen=True):
    """What can be seen of a socket; None: that cannot be told.

    Args:
        is_open: over TCP: and listens.
        is_connected: over UDP: to one peer.
        is_on_device: bound to a network interface, and new sockets are not.
        is_member: the kernel has it in its group, and in the table of the program.
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
    TELL = "the worker is not replaced, as a new socket would get everything; see `steer reload`"


class Departure(Enum):
    """Why a socket is not what it was, in words that follow "left the group: "."""

    CLOSED = "the worker closed it, or listens on it no more"
    CONNECTED = "it was connected to a peer after steer bound it"
    ON_DEVICE = "it was bound to a device after steer bound it"
    DISSOLVED = "it was connected to a peer, or bound to a device, for a while"
    RELISTENS = "it was shut down, and listens again"
    ALONE = "SO_REUSEPORT was set to 0"


def cure(found: Departure, splits: bool) -> Cure:
    """What to do. No call puts a bound UDP socket into a group, so most take a new one.

    Args:
        splits: a socket that is bound now would form a group with one that is connected, and get
            everything.
    """
    if found is Departure.CONNECTED and splits:
        return Cure.TELL
    return _CURES.get(found, Cure.REPLACE)


_CURES = {Departure.RELISTENS: Cure.REJOIN, Departure.ALONE: Cure.SHARE}


def departure(protocol: str, seen: Sighting) -> Departure | None:
    """Why it is not in its group as it was; None if it is, as far as can be told.

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
"""So long after the last one the next replacement may begin; after these there is none."""
_FORGOTTEN_S = 600.0


class Tries:
    """Replacements on one seat. A worker that does the same each time is not helped by them."""

    def __init__(self) -> None:
        self._begun_s: list[float] = []

    def begin(self, now_s: float) -> bool:
        """Whether another may begin now; if so it has."""
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
    NOTHING = "all is well, as far as can be seen"
    ATTACH = "attach the program again, as that costs nothing while it chooses nobody"
    TELL = "attach it again, and say so: it chooses nobody, and somebody gets something"


_IDLE_LOOKS, _ARRIVALS = 4, 3
"""A connection may arrive long after its SYN, for which it was chosen: one is no proof."""


class Bypass:
    """Whether what arrives at one address goes by the program.

    The kernel tells nobody which program a group has. But ours counts what it chooses: where
    that stays the same, and queues or open connections become more, it was not asked.
    """

    def __init__(self) -> None:
        self._chosen = -1
        self._waiting: Mapping[int, int] = {}
        self._looks = self._arrivals = 0

    def look(self, chosen: int, waiting: Mapping[int, int]) -> Advice:
        """What to do.

        Args:
            chosen: by the program so far.
            waiting: of each socket, by inode: connections that are open, or what is in its queue.
        """
        before = self._waiting
        has_more = any(now > before.get(inode, now) for inode, now in waiting.items())
        self._waiting = waiting
        if chosen != self._chosen:
            self._chosen, self._looks, self._arrivals = chosen, 0, 0
            return Advice.NOTHING
        self._looks += 1
        self._arrivals += has_more
        if self._arrivals == _ARRIVALS:
            self._looks = self._arrivals = 0
            return Advice.TELL
        return Advice.NOTHING if self._looks % _IDLE_LOOKS else Advice.ATTACH
