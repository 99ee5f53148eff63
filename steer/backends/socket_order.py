"""The order of sockets in each group, by which classic BPF selects them.

A classic program returns an index into the kernel's array of the group's sockets
(`policy.classic.Order`). So the backend has to know at which index the socket of each slot is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from steer.backends.anchors import ANCHOR, Anchors, may_split
from steer.config.address import Bind
from steer.config.service import Service
from steer.policy.classic import Order
from steer.sockets import members


class StoredOrder(msgspec.Struct):
    """What the next controller needs to know of the order.

    Args:
        slots: for each bind, the slots in order.
        anchored: the binds that have an anchor.
        unknown: the binds whose order is not known.
        filled: bind and number of each filler.
    """

    slots: list[list[int]]
    anchored: list[int] = []
    unknown: list[int] = []
    filled: list[tuple[int, int]] = []


class SocketOrder:
    """The order in all groups of a service, and the anchors that are part of it.

    Attributes:
        anchors: sockets of the controller; in the order they have negative numbers, as slots do
            not.
        unknown: the binds whose order is not known any more.
    """

    def __init__(self, binds: Sequence[Bind]) -> None:
        self._binds = binds
        self._orders = [Order() for _ in binds]
        self.anchors = Anchors()
        self.unknown: set[int] = set()

    @property
    def slots(self) -> Sequence[int] | None:
        """The slots in the order that all groups have once the anchors have left; None if it is
        not the same in all, or not known."""
        if self.unknown:
            return None
        found = {tuple(_without_anchors(order).indexes()) for order in self._orders}
        return found.pop() if len(found) == 1 else None

    def indexes(self, bind: int) -> dict[int, int]:
        """The index of each slot, in order."""
        return self._orders[bind].indexes()

    def last(self) -> set[int | None]:
        """The slot, or anchor, at the end of each group."""
        return {order.last for order in self._orders}

    def open_anchors(self, service: Service) -> None:
        """Open anchors where they are of use, before any worker has a socket."""
        self.anchors.open(self._binds, service)
        for bind in self.anchors:
            self._orders[bind].joined(ANCHOR)

    def close_anchors(self) -> None:
        for bind in self.anchors:
            for number in (ANCHOR, *self.anchors.fillers(bind)):
                self.remove(bind, number)
        self.anchors.close()

    def add(self, slot: int) -> None:
        """Add the sockets of a slot, which is not selected yet, at the end of all groups."""
        for order in self._orders:
            order.joined(slot)
        for bind, address in enumerate(self._binds):
            # The new socket is the last one, so it moves to the place of the filler.
            number = self.anchors.empty_one(bind)
            if number is not None:
                self._orders[bind].left(number)
            self.anchors.renew(bind, address)
        self.check()

    def remove(self, bind: int, slot: int) -> None:
        """The slot's socket has left its group; nothing changes if that is known already."""
        if slot in self._orders[bind]:
            self._orders[bind].left(slot)

    def move_to_end(self, bind: int, slot: int) -> None:
        """The slot's socket has left its group, and has joined it again."""
        self.remove(bind, slot)
        self._orders[bind].joined(slot)

    def fill_place_of(self, slot: int) -> None:
        """Before a slot leaves: have a filler be the last socket, so that the kernel moves that to
        the free place, and not the socket of a worker."""
        for bind in self.anchors:
            order = self._orders[bind]
            if slot not in order or order.last in (None, slot, *_anchors_of(order)):
                continue
            number = self.anchors.fill(bind, self._binds[bind])
            if number is not None:
                order.joined(number)

    def check(self) -> None:
        """Look for connected sockets of workers, when a slot was added or is about to be removed.
        They may be anywhere in the order, which is not known from then on."""
        for bind, address in enumerate(self._binds):
            is_known = bind not in self.unknown and may_split(address)
            if is_known and members.connected_stay() and members.has_connected(address):
                self.unknown.add(bind)
                if bind in self.anchors:
                    self.anchors.drop(bind)

    def stored(self) -> tuple[StoredOrder, Sequence[int]]:
        """See `restore`."""
        slots = [list(order.indexes()) for order in self._orders]
        anchors = self.anchors
        value = StoredOrder(slots, list(anchors), sorted(self.unknown), anchors.filled)
        return value, [sock.fileno() for sock in anchors.all]

    def restore(
        self, stored: StoredOrder, fds: Sequence[int], held: Mapping[int, Sequence[int]]
    ) -> None:
        """Continue with the order of an earlier controller, and own its descriptors.

        Args:
            held: see `Persistent.restore`.
        """
        self._orders = [Order(slots) for slots in stored.slots]
        self.unknown = set(stored.unknown)
        anchors = len(stored.anchored)
        self.anchors.receive(stored.anchored, fds[:anchors])
        self.anchors.receive_fillers(stored.filled, fds[anchors:])
        ended = [slot for slot, mine in held.items() if not mine]
        for bind, order in enumerate(self._orders):
            # A slot that nothing is held of was about to be added or removed.
            unknown = [slot for slot in order.indexes() if slot > ANCHOR and slot not in held]
            for slot in (*unknown, *ended):
                self.remove(bind, slot)


def _without_anchors(order: Order) -> Order:
    """What the order is once the anchors have left, in the order in which they do."""
    found = Order(order.indexes())
    for number in _anchors_of(order):
        found.left(number)
    return found


def _anchors_of(order: Order) -> list[int]:
    """The numbers of the anchor and the fillers, in the order in which they leave."""
    return sorted((each for each in order.indexes() if each <= ANCHOR), reverse=True)
