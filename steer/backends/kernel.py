"""The backend without a program: the kernel's hash selects among all sockets of a group."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

import msgspec

from steer.backends import connections
from steer.backends.backup import Lend
from steer.backends.base import Counts
from steer.backends.connections import Counting
from steer.backends.shortfalls import NO_EXCLUSION, may_be_lost
from steer.backends.without_ebpf import WithoutEbpf
from steer.config.plan import Plan
from steer.config.service import Service
from steer.policy import classic
from steer.policy.layout import Member
from steer.sockets import group_program


class Kernel(WithoutEbpf):
    """Leaves the selection to the kernel's hash.

    Args:
        counting: counts open connections already, for the backend before; None: nothing counts
            them.
        order: the order of the sockets that exist already, see `Backend.order`.
    """

    name = "kernel"
    needs_order = False

    def __init__(
        self,
        plan: Plan,
        _empty: bool = False,
        counting: Counting | None = None,
        order: Sequence[int] | None = (),
    ) -> None:
        self.notes: Sequence[str] = (NO_EXCLUSION, *may_be_lost(plan.binds)) if plan.binds else ()
        self._plan = plan
        self.counting = counting
        self.owns_counting = False
        self._order = classic.SeenOrder(order)

    @property
    def order(self) -> Sequence[int] | None:
        return self._order.slots

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        """There are none, as the kernel's hash would select them, too."""
        return {}

    @property
    def controller_sockets(self) -> Sequence[socket.socket]:
        return ()

    def open_anchors(self) -> None:
        pass

    def renew_anchors(self, service: Service) -> None:
        pass

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        if self.counting:
            self.counting.add_listeners(slot, fds, self._plan.binds)
        self._order.joined(slot)
        for fd in fds:
            os.close(fd)

    def take_over(self, slot: int, fds: Sequence[int]) -> None:
        """The sockets are in their groups already, and keep their places."""
        for fd in fds:
            os.close(fd)

    def record_departure(self, slot: int, bind: int) -> None:
        self._order.left(slot)

    def rejoin(self, slot: int, bind: int, sock: socket.socket) -> None:
        self._order.left(slot)
        self._order.joined(slot)

    def remove_member(self, slot: int) -> None:
        self._order.left(slot)
        if self.counting:
            self.counting.remove_listeners(slot)

    def take_counts(self, slot: int) -> Counts | None:
        if self.counting:
            self.counting.slots.end(slot)
        return None

    def open(self, slot: int) -> int | None:
        return self.counting.open(slot) if self.counting else None

    def steer(self, members: Sequence[Member]) -> None:
        pass

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        pass

    def reattach(self, lend: Lend) -> None:
        pass

    def detach(self, lend: Lend) -> None:
        pass

    def grace_period(self) -> tuple[object, int] | None:
        return None

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        pass

    def reassert(self, sockets: Mapping[int, Mapping[int, socket.socket]]) -> None:
        for socks in sockets.values():
            for sock in socks.values():
                group_program.detach(sock.fileno())

    def release(self) -> None:
        pass

    def held(self, slot: int) -> Sequence[int]:
        return ()

    def stored(self) -> tuple[object, Sequence[int]]:
        return self.counting.stored() if self.counting else (None, ())

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        self._order = classic.SeenOrder(None)
        if value is not None:
            self.counting, self.owns_counting = Counting(0), True
            self.counting.restore(
                msgspec.convert(value, connections.StoredCounting, strict=False), fds
            )

    def close(self) -> None:
        if self.counting and self.owns_counting:
            self.counting.close()
