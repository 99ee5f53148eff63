"""What carries a policy out: the shape that every backend has, and what they share.

A backend is told which sockets join and leave and which members may be chosen;
what it has to do to the kernel for that is its own affair.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import msgspec

from steer import features
from steer.backends.connections import Counting
from steer.config.plan import Plan
from steer.config.service import Service
from steer.errors import KernelError
from steer.policy.layout import Member
from steer.sockets import listeners, reuseport

Lend = Callable[[], AbstractContextManager[Mapping[int, socket.socket]]]
"""Sockets of a worker that serves, by bind, for a moment; none if nobody does.
May raise KernelError."""


class Counts(msgspec.Struct, frozen=True):
    """Of one slot: selections in all, those of them in place of a slot that was gone,
    and those of them taken over from a closing listener."""

    selected: int = 0
    fallback: int = 0
    migrated: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.selected + other.selected,
            self.fallback + other.fallback,
            self.migrated + other.migrated,
        )


class Own(msgspec.Struct, frozen=True):
    """What a policy declares for itself, as it is now.

    Args:
        histograms: of each, how many values had so many binary digits.
    """

    params: dict[str, int] = {}
    counters: dict[str, int] = {}
    histograms: dict[str, list[int]] = {}


class Backend(Protocol):
    """One service's groups, on one backend."""

    backend: str

    @property
    def notes(self) -> Sequence[str]:
        """What this backend cannot do here, in words."""

    @property
    def reserve(self) -> Sequence[socket.socket]:
        """Listeners of our own, where connections wait while there is no worker."""

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        """By bind, a socket of our own that workers join the group through."""

    @property
    def own_sockets(self) -> Sequence[socket.socket]:
        """All that are of our own in the groups of workers."""

    def open_anchors(self) -> None:
        """Make them, where they are of use, before any worker has a socket."""

    def open_reserve(self) -> None:
        """Make the reserve, where it is of use.

        Raises:
            BindError, KernelError
        """

    def renew_reserve(self, service: Service) -> None:
        """Have it listen as workers of another configuration do.

        Raises:
            BindError, KernelError: it does not, or not all of it.
        """

    def empty_reserve(self) -> None:
        """Move what waits there to workers."""

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """Take in the sockets of a new worker, one for each bind; the fds become ours."""

    needs_order: bool
    """Whether it can take over only sockets whose order in the kernel is known."""

    @property
    def order(self) -> Sequence[int] | None:
        """The slots in the order in which the kernel has their sockets, in every group; None
        where that is not known."""

    def taken_over(self, slot: int, fds: Sequence[int]) -> None:
        """The same of a worker that was another backend's before; it may be serving. One after
        the other as they stand in `order`, if that is needed; `steer` is to follow."""

    def reassert(self, there: Mapping[int, Mapping[int, socket.socket]]) -> None:
        """After `restore`: have the kernel be as we take it to be. Who was there before may
        have been killed in the middle of a change.

        Args:
            there: sockets of the workers there are, by slot and bind.

        Raises:
            KernelError
        """

    @property
    def counting(self) -> Counting | None:
        """What counts open connections, which outlives a change of backend."""

    owns_counting: bool
    """Whether it is closed with this backend."""

    def left(self, slot: int) -> None:
        """The worker in `slot` has ended, or lost its sockets."""

    def is_member(self, slot: int, bind: int) -> bool | None:
        """Whether the slot's socket is in its group as it was when it joined; None where that
        cannot be told. May take as long as to attach a program."""

    def lost(self, slot: int, bind: int) -> None:
        """The slot's socket was seen to be in its group no more."""

    def rejoined(self, slot: int, bind: int, sock: socket.socket) -> None:
        """It was out of its group for a moment, and is a member again. Raises KernelError."""

    def attach_again(self, lend: Lend) -> None:
        """What is attached already, as a member may have attached something else to its group.

        Raises:
            KernelError
        """

    def steer(self, members: Sequence[Member]) -> None:
        """From now on choose among these, and these only."""

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        """Choose by the policy, parameters and weights of another plan from now on.

        Raises:
            KernelError: nothing has changed.
        """

    def unsettled(self) -> tuple[object, int] | None:
        """Which change of who is chosen it was since which programs may still choose as before,
        so that the next would wait for them; None where none may."""

    def settled(self, flip: tuple[object, int]) -> None:
        """All programs that ran when `unsettled` told of this one have ended."""

    def let_go(self, slot: int) -> None:
        """What a policy remembers to be at this slot is to be chosen for anew."""

    def remembers(self) -> bool:
        """Whether the policy sends anything to slots that are no members any more."""

    def samples(self) -> bool:
        """Whether it has to be told with `sample` what waits at each slot."""

    def sample(self, slot: int, waiting: int) -> None:
        """So much waits there now."""

    def detach(self, lend: Lend) -> None:
        """Leave the choice to the kernel, before another backend takes over.

        Raises:
            KernelError: nothing has changed.
        """

    def rescue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """Move what waits at these sockets of `slot`, by bind, to others; it must be no member."""

    def release(self) -> None:
        """The service ends: hold no socket open that its worker closes."""

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        """What was selected so far, for one bind or for all; None where nobody counts."""

    def retire(self, slot: int) -> Counts | None:
        """The same, and begin anew at nothing: the slot is somebody else's from now on."""

    def open(self, slot: int) -> int | None:
        """Connections open there; None where they are not counted."""

    def busy(self) -> Set[int] | None:
        """The slots that have connections open; None where not all that may wait at a worker is
        counted, as of datagrams. Costs next to nothing."""

    def pulse(self) -> bytes | None:
        """Another whenever anything came to a worker or was finished, by whichever way; None as
        of `busy`. Costs next to nothing."""

    def memory_bytes(self) -> int:
        """What its maps take of the kernel's memory."""

    def own(self) -> Own:
        """What the policy counts for itself, and its parameters."""

    def unsteered(self) -> int | None:
        """Selections that were left to the kernel's hash, as no live slot was found."""

    def held(self, slot: int) -> Sequence[int]:
        """Descriptors of the slot's sockets that are held here."""

    def saved(self) -> tuple[object, Sequence[int]]:
        """What `restore` makes the same of again: a value for JSON, and descriptors."""

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        """Go on where one that is gone stopped, with what it saved; the fds become ours.

        Args:
            held: what it held of each slot that it knew of; none of those whose workers
                have ended since, in that order.
        """

    def close(self) -> None:
        """Let go of everything."""


class Uncounting:
    """What is the same on backends that run no eBPF program."""

    reserve: Sequence[socket.socket] = ()
    owns_counting = False

    @property
    def order(self) -> Sequence[int] | None:
        return None

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        return {}

    @property
    def own_sockets(self) -> Sequence[socket.socket]:
        return ()

    def open_anchors(self) -> None:
        """The kernel's hash would choose them."""

    def open_reserve(self) -> None:
        """Nobody would move what waits there."""

    def renew_reserve(self, service: Service) -> None:
        pass

    def empty_reserve(self) -> None:
        pass

    def rescue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """By the kernel's hash, if that was told to move queues, for all we know: without, closing
        the listener would reset what waits."""
        if _kernel_migrates():
            for index, sock in owned.items():
                if listeners.is_waited_for(sock):
                    listeners.move_queue(sock)
                    self.rejoined(slot, index, sock)

    def is_member(self, slot: int, bind: int) -> bool | None:
        return None

    def lost(self, slot: int, bind: int) -> None:
        pass

    def rejoined(self, slot: int, bind: int, sock: socket.socket) -> None:
        pass

    def attach_again(self, lend: Lend) -> None:
        pass

    def reassert(self, there: Mapping[int, Mapping[int, socket.socket]]) -> None:
        pass

    @property
    def counting(self) -> Counting | None:
        return None

    def unsettled(self) -> tuple[object, int] | None:
        return None

    def settled(self, flip: tuple[object, int]) -> None:
        pass

    def let_go(self, slot: int) -> None:
        pass

    def remembers(self) -> bool:
        return False

    def samples(self) -> bool:
        return False

    def sample(self, slot: int, waiting: int) -> None:
        pass

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        return None

    def open(self, slot: int) -> int | None:
        return None

    def busy(self) -> Set[int] | None:
        return None

    def pulse(self) -> bytes | None:
        return None

    def memory_bytes(self) -> int:
        return 0

    def own(self) -> Own:
        return Own()

    def retire(self, slot: int) -> Counts | None:
        return None

    def unsteered(self) -> int | None:
        return None


STILL_CHOSEN = (
    "a worker that hangs, is at capacity or is to end gets connections until it closes its socket"
)
CHOSEN_ALL_THE_SAME = "the kernel's own hash chooses it all the same"
_LOST = "queued at a worker that crashes or hangs are lost"
_MAY_BE_LOST = "queued at a worker that crashes or hangs may be lost"
_UNTOLD = "it could not be told whether the kernel moves them"
DATAGRAMS_LOST = f"datagrams {_LOST}: the kernel moves none"


def may_be_lost(plan: Plan, migrates: bool | None = None) -> Sequence[str]:
    """What is gone with a worker that crashes or hangs.

    Args:
        migrates: whether our program moves queues; None where there is none that could.
    """
    protocols = {bind.protocol for bind in plan.binds}
    notes = []
    if "tcp" in protocols and not migrates and (note := _connections_lost(migrates)):
        notes.append(note)
    if "udp" in protocols:
        notes.append(DATAGRAMS_LOST)
    return tuple(notes)


def _connections_lost(migrates: bool | None) -> str:
    """Where our program does not move them; "" where the kernel does."""
    try:
        told = reuseport.tcp_migrate_req()
    except KernelError as error:
        return f"connections {_MAY_BE_LOST}: {_UNTOLD} ({error})"
    if told:
        return ""
    if told is None or migrates is False:
        return f"connections {_LOST}: migration needs Linux {features.MIGRATE.version}"
    by_sysctl = "ebpf would move them, and so would sysctl net.ipv4.tcp_migrate_req=1"
    return f"connections {_LOST}: {by_sysctl}"


def _kernel_migrates() -> bool:
    """Whether it is known to."""
    with suppress(KernelError):
        return bool(reuseport.tcp_migrate_req())
    return False
