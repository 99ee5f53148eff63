"""What a backend has to be able to do: it carries out a policy for the groups of one service.

A backend is told which sockets join and leave and which workers may be selected; what it does to
the kernel for that is its own affair. `Backend` is made of small protocols, one for each kind of
caller. What only some backends have is an attribute, None on the others.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

import msgspec

from steer.backends.backup import BackupListeners, Lend
from steer.backends.connections import Counting
from steer.config.plan import Plan
from steer.config.service import Service
from steer.policy.layout import Member


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


class PolicyValues(msgspec.Struct, frozen=True):
    """What a policy declares for itself, as it is now.

    Args:
        histograms: of each, how many values had so many binary digits.
    """

    params: dict[str, int] = {}
    counters: dict[str, int] = {}
    histograms: dict[str, list[int]] = {}


class Members(Protocol):
    """The sockets of workers in their groups."""

    needs_order: bool
    """Whether it can take over only sockets whose order in the kernel is known."""

    @property
    def order(self) -> Sequence[int] | None:
        """The slots in the order in which the kernel has their sockets, in every group; None
        where that is not known."""

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        """Take in the sockets of a new worker, one for each bind; the fds become ours."""

    def take_over(self, slot: int, fds: Sequence[int]) -> None:
        """Take in the sockets of a worker that another backend had; it may be serving. Call it
        for one after the other as they stand in `order`, if that is needed; then `steer`."""

    def remove_member(self, slot: int) -> None:
        """The worker in `slot` has ended, or lost its sockets."""

    def held(self, slot: int) -> Sequence[int]:
        """Descriptors of the slot's sockets that are held here."""

    def is_member(self, slot: int, bind: int) -> bool | None:
        """Whether the slot's socket is in its group as it was when it joined; None where that
        cannot be told. May take as long as to attach a program."""

    def record_departure(self, slot: int, bind: int) -> None:
        """The slot's socket was seen to be in its group no more."""

    def rejoin(self, slot: int, bind: int, sock: socket.socket) -> None:
        """It was out of its group for a moment, and is a member again. Raises KernelError."""

    def migrate_queue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """Move what waits at these sockets of `slot`, by bind, to others; it must be no member."""


class Selector(Protocol):
    """Which workers are selected, and by which policy."""

    @property
    def forget_flows(self) -> Callable[[int], None] | None:
        """Makes the policy choose again for the flows that it remembers to be at this slot; None
        where it sends nothing to slots that are no members any more."""

    @property
    def tell_waiting(self) -> Callable[[int, int], None] | None:
        """Tells it how much waits at a slot: slot, number. None where it need not be told."""

    def steer(self, members: Sequence[Member]) -> None:
        """From now on choose among these, and these only."""

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        """Choose by the policy, parameters and weights of another plan from now on.

        Raises:
            KernelError: nothing has changed.
        """

    def reattach(self, lend: Lend) -> None:
        """Attach what is attached already, as a member may have attached something else to its
        group.

        Raises:
            KernelError
        """

    def detach(self, lend: Lend) -> None:
        """Leave the choice to the kernel, before another backend takes over.

        Raises:
            KernelError: nothing has changed.
        """

    def grace_period(self) -> tuple[object, int] | None:
        """Which change of who is chosen it was since which programs may still choose as before,
        so that the next would wait for them; None where none may."""

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        """All programs that ran when `grace_period` told of this one have ended."""


class Counters(Protocol):
    """What is counted; None where nobody counts it."""

    owns_counting: bool
    """Whether `counting` is closed with this backend."""

    @property
    def counting(self) -> Counting | None:
        """Counts open connections. It outlives a change of backend."""

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        """What was selected so far, for one bind or for all."""

    def take_counts(self, slot: int) -> Counts | None:
        """The same, and begin again at nothing: the slot is somebody else's from now on."""

    def unsteered(self) -> int | None:
        """Selections that were left to the kernel's hash, as no live slot was found."""

    def open(self, slot: int) -> int | None:
        """Connections open there."""

    def busy(self) -> Set[int] | None:
        """The slots that have connections open; None where not all that may wait at a worker is
        counted, as of datagrams. Costs next to nothing."""

    def pulse(self) -> bytes | None:
        """Another whenever anything came to a worker or was finished, by whichever way; None as
        of `busy`. Costs next to nothing."""

    def policy_values(self) -> PolicyValues:
        """What the policy counts for itself, and its parameters."""

    def memory_bytes(self) -> int:
        """What its maps take of the kernel's memory."""


class ControllerSockets(Protocol):
    """Sockets of the controller's own in the groups of workers."""

    @property
    def backup(self) -> BackupListeners | None:
        """Where connections wait while there is no worker; None where nobody would move them."""

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        """By bind, a socket of our own that workers join the group through."""

    @property
    def controller_sockets(self) -> Sequence[socket.socket]:
        """All of them."""

    def open_anchors(self) -> None:
        """Open them, where they are of use, before any worker has a socket."""

    def renew_anchors(self, service: Service) -> None:
        """Have them be as another configuration needs them."""


class Persistent(Protocol):
    """What outlives the controller, and how a backend ends."""

    def stored(self) -> tuple[object, Sequence[int]]:
        """What `restore` makes the same of again: a value for JSON, and descriptors."""

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        """Go on where one that is gone stopped, with what it saved; the fds become ours.

        Args:
            held: what it held of each slot that it knew of; none of those whose workers
                have ended since, in that order.
        """

    def reassert(self, there: Mapping[int, Mapping[int, socket.socket]]) -> None:
        """After `restore`: have the kernel be as we take it to be. The last controller may have
        been killed in the middle of a change.

        Args:
            there: sockets of the workers there are, by slot and bind.

        Raises:
            KernelError
        """

    def release(self) -> None:
        """The service ends: hold no socket open that its worker closes."""

    def close(self) -> None:
        """Let go of everything."""


class Backend(Members, Selector, Counters, ControllerSockets, Persistent, Protocol):
    """The groups of one service, on one backend."""

    name: str
    """Its name, as in `--backend`."""

    @property
    def notes(self) -> Sequence[str]:
        """What it cannot do here, in words."""
