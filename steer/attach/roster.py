"""The listeners of an attached group: their slots, and which of them may be selected. Pure."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from steer.attach.holders import Holder
from steer.backends.base import Counts
from steer.sockets.sock_diag import Listener


class State(enum.Enum):
    """The state of a member, as `steer status` shows it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    CLOSING = "stopping"


class Member(msgspec.Struct, eq=False):
    """A listener in a slot.

    Args:
        joined_s: when it joined; from time.monotonic().
        holders: the processes that have it open.
        pid: the one that was seen to wait on it last; None as long as none was.
        tid: the thread of it that waits; None: not known.
        before: what an attacher before this one has counted.
    """

    slot: int
    listener: Listener
    joined_s: float
    holders: Sequence[Holder]
    state: State = State.STARTING
    pid: int | None = None
    tid: int | None = None
    before: Counts = Counts()

    @property
    def is_selected(self) -> bool:
        return self.state is State.READY


class Slots:
    """The slots of a service. No two of its groups use the same one.

    Args:
        capacity: how many there are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: set[int] = set()

    @property
    def room(self) -> int:
        """How many are free."""
        return self.capacity - len(self._taken)

    def lowest(self) -> int:
        """The lowest that is free. Raises LookupError: there is none."""
        for slot in range(self.capacity):
            if slot not in self._taken:
                return slot
        raise LookupError

    def take(self, slot: int) -> None:
        self._taken.add(slot)

    def give_back(self, slot: int) -> None:
        self._taken.discard(slot)


class Roster:
    """The members of a group."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._members: dict[int, Member] = {}
        self._wanted: dict[int, int] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._members.values(), key=lambda each: each.slot))

    def __len__(self) -> int:
        return len(self._members)

    def at(self, slot: int) -> Member | None:
        return next((each for each in self if each.slot == slot), None)

    def new(self, there: Mapping[int, Listener]) -> list[Listener]:
        """The listeners that are not members yet, the oldest first."""
        unknown = (each for inode, each in there.items() if inode not in self._members)
        return sorted(unknown, key=lambda each: each.inode)

    def gone(self, there: Collection[int]) -> list[Member]:
        return [each for each in self if each.listener.inode not in there]

    def add(self, listener: Listener, holders: Sequence[Holder], now_s: float, slot: int) -> Member:
        """Give it a slot that is free."""
        member = Member(slot, listener, now_s, holders)
        self._members[listener.inode] = member
        self._slots.take(slot)
        return member

    @property
    def room(self) -> int:
        """How many slots are free."""
        return self._slots.room

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    def free_slot(self, inode: int) -> int:
        """A slot for a listener. Raises LookupError: there is none."""
        slot = self._wanted.get(inode)
        return self._slots.lowest() if slot is None else slot

    @contextmanager
    def wanted(self, slots: Mapping[int, int]) -> Iterator[None]:
        """Give these listeners, by inode, these slots, and no other listener."""
        self._wanted = {inode: slot for inode, slot in slots.items() if slot < self._slots.capacity}
        for slot in self._wanted.values():
            self._slots.take(slot)
        try:
            yield
        finally:
            for inode in self._wanted.keys() - self._members.keys():
                self._slots.give_back(self._wanted[inode])
            self._wanted = {}

    def remove(self, member: Member) -> None:
        del self._members[member.listener.inode]
        self._slots.give_back(member.slot)

    @property
    def selected(self) -> list[Member]:
        return [each for each in self if each.is_selected]

    @property
    def starting(self) -> list[Member]:
        return [each for each in self if each.state is State.STARTING]

    def admit(self, waited_on: Collection[int]) -> list[Member]:
        """Let new members be selected: those that a process waits on, or all if no other serves.

        Args:
            waited_on: the inodes of listeners that a process waits on.
        """
        everybody = not self.selected
        admitted = [each for each in self.starting if everybody or each.listener.inode in waited_on]
        for each in admitted:
            each.state = State.READY
        return admitted
