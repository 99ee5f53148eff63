"""The door to the backends, and the one that is the kernel's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

import msgspec

from steer.backends import connections
from steer.backends.base import STILL_CHOSEN, Backend, Counts, Lend, Uncounting, may_be_lost
from steer.backends.cbpf import Cbpf
from steer.backends.connections import Counting
from steer.backends.ebpf import NOT_COUNTED, SAMPLED, Ebpf
from steer.config.plan import Plan
from steer.errors import FallbackRefused, SteerError, Uncounted
from steer.policy import builtin, classic
from steer.policy.layout import Member
from steer.sockets import reuseport


def open_backend(
    backend: str, plan: Plan, empty: bool = False, before: Backend | None = None
) -> Backend:
    """Make the backend ready, before there is any socket.

    Args:
        empty: nothing is loaded, as `restore` is to follow.
        before: the backend that is there now, whose sockets it is to take over.

    Raises:
        KernelError: this rung does not hold; the reason is in it.
    """
    counting = before.counting if before else None
    if backend == builtin.CBPF:
        return Cbpf(plan, empty)
    if backend == builtin.EBPF:
        return Ebpf(plan, empty, counting)
    return Kernel(plan, empty, counting, before.order if before else ())


def open_whole(plan: Plan, before: Backend | None = None) -> Backend:
    """Open the backend that a plan is to stand on, unless it would do by halves what is asked.

    Args:
        before: see `open_backend`.

    Raises:
        As `open_backend` and `refuse_uncounted`.
    """
    opened = open_backend(plan.rungs[0].backend, plan, before=before)
    try:
        refuse_uncounted(plan, opened.counting)
    except SteerError:
        opened.close()
        raise
    return opened


def refuse_uncounted(plan: Plan, counting: Counting | None) -> None:
    """See that what goes by open connections has them counted, or may do without.

    Raises:
        Uncounted: they are not, and `auto` has another policy for that.
        FallbackRefused: they are not, and --strict.
    """
    if counting is None or not counting.why_not or not plan.policy.reads_load:
        return
    if plan.policy_reason is not None:
        cause, cure, number = counting.why_not
        raise Uncounted("open connections cannot be counted", cause, cure, errno=number)
    if plan.service.strict:
        raise FallbackRefused(
            f"use {plan.policy.name}",
            f"--strict, and {NOT_COUNTED}: {counting.why_not}; {SAMPLED}",
            "drop --strict, or see `steer doctor`",
        )


class Kernel(Uncounting):
    """No program: the kernel hashes over all sockets of a group.

    Where another backend was there before, open connections are counted on.

    Args:
        order: see `Backend.order`, of the sockets that are there.
    """

    backend = "kernel"
    needs_order = False

    def __init__(
        self,
        plan: Plan,
        _empty: bool = False,
        counting: Counting | None = None,
        order: Sequence[int] | None = (),
    ) -> None:
        self.notes: Sequence[str] = (STILL_CHOSEN, *may_be_lost(plan))
        self._plan = plan
        self._counting = counting
        self.owns_counting = False
        self._order = classic.SeenOrder(order)

    @property
    def order(self) -> Sequence[int] | None:
        return self._order.slots

    @property
    def counting(self) -> Counting | None:
        return self._counting

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        if self._counting:
            self._counting.joined(slot, fds, self._plan.binds)
        self._order.joined(slot)
        for fd in fds:
            os.close(fd)

    def taken_over(self, slot: int, fds: Sequence[int]) -> None:
        """It stands where it stood."""
        for fd in fds:
            os.close(fd)

    def lost(self, slot: int, bind: int) -> None:
        self._order.left(slot)

    def rejoined(self, slot: int, bind: int, sock: socket.socket) -> None:
        self._order.left(slot)
        self._order.joined(slot)

    def left(self, slot: int) -> None:
        self._order.left(slot)
        if self._counting:
            self._counting.left(slot)

    def retire(self, slot: int) -> Counts | None:
        if self._counting:
            self._counting.slots.end(slot)
        return None

    def open(self, slot: int) -> int | None:
        return self._counting.open(slot) if self._counting else None

    def steer(self, members: Sequence[Member]) -> None:
        pass

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        pass

    def detach(self, lend: Lend) -> None:
        pass

    def reassert(self, there: Mapping[int, Mapping[int, socket.socket]]) -> None:
        for socks in there.values():
            for sock in socks.values():
                reuseport.detach(sock.fileno())

    def release(self) -> None:
        pass

    def held(self, slot: int) -> Sequence[int]:
        return ()

    def saved(self) -> tuple[object, Sequence[int]]:
        return self._counting.saved() if self._counting else (None, ())

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        self._order = classic.SeenOrder(None)
        if value is not None:
            self._counting, self.owns_counting = Counting(0), True
            self._counting.restore(msgspec.convert(value, connections.Saved, strict=False), fds)

    def close(self) -> None:
        if self._counting and self.owns_counting:
            self._counting.close()
