"""Sees that each group has the program that steer attached, and attaches it again.

Any member may attach another one to the whole group, or detach ours, and some servers do so by
themselves. What follows from what is seen is in `membership.Bypass`.
"""

from __future__ import annotations

from collections.abc import Callable

from steer import reserve
from steer.address import Bind
from steer.fleet import Fleet
from steer.kernel import members, proc
from steer.membership import Advice, Bypass
from steer.queues import Table

_AT_ONCE = 512
"""So many counters, some microseconds each, are read a second."""
_BLIND_LOOKS = 5
"""Where nobody counts the program is attached again every so often."""
_RESTS = 4
"""The same while nothing comes."""

Standings = Callable[[Bind], Table | None]


class Programs:
    """Looks once a second, at most; or rests, as nothing came since the last look."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._bypasses: dict[int, Bypass] = {}
        self._met: set[int] = set()
        self._drops: dict[tuple[int, int], int] = {}
        self._look = self._rested = 0

    def look(self, standing_at: Standings) -> None:
        """Args: standing_at: how the sockets of an address stand now, by inode."""
        self._look += 1
        binds = self._fleet.generation.plan.binds
        if self._look % (1 + len(self._fleet.places) * len(binds) // _AT_ONCE):
            return
        advice = {at: self._look_at(at, bind, standing_at) for at, bind in enumerate(binds)}
        advice |= dict.fromkeys(self._given_to_anchors(), Advice.TELL)
        if self._somebody_is_new() or set(advice.values()) != {Advice.NOTHING}:
            self._fleet.attach_again()
        for at, each in advice.items():
            if each is Advice.TELL:
                self._tell(binds[at])

    def rest(self) -> None:
        """A program that somebody else attached meanwhile has chosen nobody yet."""
        self._rested += 1
        if self._rested % _RESTS == 0:
            self._fleet.attach_again()

    def _somebody_is_new(self) -> bool:
        """Servers that attach a program of their own do so when they start."""
        there = {each.process.pid for each in self._fleet.places if each.process and each.serves}
        before, self._met = self._met, there
        return not there <= before

    def _given_to_anchors(self) -> list[int]:
        """At which addresses an anchor was chosen, which ours never does."""
        before = self._drops
        self._drops = {
            (at, proc.socket_inode(sock.fileno())): members.drops(sock)
            for at, sock in self._fleet.steering.anchors.items()
        }
        return [key[0] for key, now in self._drops.items() if now > before.get(key, now)]

    def _look_at(self, at: int, bind: Bind, standing_at: Standings) -> Advice:
        chosen = self._chosen(at)
        if chosen is None:
            return Advice.NOTHING if self._look % _BLIND_LOOKS else Advice.ATTACH
        standing = standing_at(bind) or {}
        waiting = {}
        for place in self._fleet.places:
            if place.process and at < len(place.process.bound) and at not in place.left:
                inode = place.process.bound[at]
                here = standing.get(inode)
                is_open = (bind.protocol == "tcp" and self._fleet.steering.open(place.slot)) or 0
                waiting[inode] = is_open + (here.queued if here and bind.protocol == "udp" else 0)
        return self._bypasses.setdefault(at, Bypass()).look(chosen, waiting)

    def _chosen(self, at: int) -> int | None:
        """By the program at this address so far; None where nobody counts."""
        steering = self._fleet.steering
        slots = [place.slot for place in self._fleet.places]
        if steering.reserve:
            first = self._fleet.generation.plan.slots
            slots += range(first, first + reserve.COUNT)
        counts = [steering.counts(slot, at) for slot in slots]
        unsteered = steering.unsteered()
        if unsteered is None:
            return None
        return unsteered + sum(each.selected for each in counts if each)

    def _tell(self, bind: Bind) -> None:
        key = f"{bind.label} past the program"
        if key in self._fleet.group_notes:
            return
        words = (
            f"what comes to {bind.label} does not go by the policy: a worker may have attached a "
            "program of its own (SO_ATTACH_REUSEPORT_CBPF, _EBPF) or detached steer's, or it is "
            "multicast, or redirected by TPROXY; steer's was attached again"
        )
        self._fleet.log.warning("%s", words)
        self._fleet.group_notes[key] = words
