"""The protocol of a backend, which carries out a policy for the groups of one service.

`Backend` consists of small protocols, one for each kind of caller. What only some backends have is
an attribute that is None on the others.
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
    """The selections of one slot.

    Args:
        selected: all of them.
        fallback: selections in place of a slot that had no socket any more.
        migrated: connections moved here from a closing listener.
    """

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
    """The current values of what a policy declares.

    Args:
        histograms: for each, how many values had 0, 1, 2, ... binary digits.
    """

    params: dict[str, int] = {}
    counters: dict[str, int] = {}
    histograms: dict[str, list[int]] = {}

    def __add__(self, other: PolicyValues) -> PolicyValues:
        """Of two groups with the same policy and parameters."""
        counters = {name: number + other.counters[name] for name, number in self.counters.items()}
        histograms = {
            name: [a + b for a, b in zip(times, other.histograms[name], strict=True)]
            for name, times in self.histograms.items()
        }
        return PolicyValues(self.params, counters, histograms)


class Members(Protocol):
    """Adds the sockets of workers to groups, and removes them."""

    needs_order: bool
    """Whether `take_over` works only if the order of the sockets in the kernel is known."""

    @property
    def order(self) -> Sequence[int] | None:
        """The slots in the order in which the kernel has their sockets, which is the same in every
        group; None if it is not known."""

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        """Add the sockets of a new worker, one for each bind, and own their descriptors."""

    def take_over(self, slot: int, fds: Sequence[int]) -> None:
        """Add the sockets of a worker of another backend; it may be serving. If `needs_order`, call
        this in the `order` of the other backend. Call `steer` after that."""

    def remove_member(self, slot: int) -> None:
        """Remove the sockets of a worker that has ended, or has lost its sockets."""

    def held(self, slot: int) -> Sequence[int]:
        """The duplicates of the slot's sockets that this backend holds."""

    def is_member(self, slot: int, bind: int) -> bool | None:
        """Whether the slot's socket is still in its group; None if that is not known. This may take
        as long as attaching a program."""

    def record_departure(self, slot: int, bind: int) -> None:
        """Take note that the slot's socket has left its group."""

    def rejoin(self, slot: int, bind: int, sock: socket.socket) -> None:
        """Add a socket that has left its group and joined it again. Raises KernelError."""

    def migrate_queue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """Move the connections that wait at these sockets to other workers.

        Args:
            slot: the slot of the worker, which must not be selected any more.
            owned: by bind.
        """


class Selector(Protocol):
    """Decides which workers are selected, and by which policy."""

    @property
    def forget_flows(self) -> Callable[[int], None] | None:
        """Makes the policy forget the flows of a slot; None if the policy remembers no flows."""

    @property
    def write_waiting(self) -> Callable[[int, int], None] | None:
        """Tells the policy the slot and how many connections wait there; None if it counts them."""

    def steer(self, members: Sequence[Member]) -> None:
        """Select among these members from now on, and no others."""

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        """Switch to the policy, parameters and weights of another plan.

        Raises:
            KernelError: nothing has changed.
        """

    def reattach(self, lend: Lend) -> None:
        """Attach the current programs again, as a worker may have attached another to its group.

        Raises:
            KernelError
        """

    def detach(self, lend: Lend) -> None:
        """Detach all programs, before another backend takes over.

        Raises:
            KernelError: nothing has changed.
        """

    def grace_period(self) -> tuple[object, int] | None:
        """The latest publication, if programs that started before it may still run and select as
        before; otherwise None."""

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        """All programs that ran when `grace_period` returned this publication have ended."""


class Counters(Protocol):
    """Reads counters; None means that something is not counted."""

    owns_counting: bool
    """Whether this backend closes `counting` when it is closed."""

    @property
    def counting(self) -> Counting | None:
        """Counts open connections. The next backend goes on with it."""

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        """The selections so far, for one bind or for all."""

    def take_counts(self, slot: int) -> Counts | None:
        """Return `counts` and reset them, because another worker gets the slot."""

    def unsteered(self) -> int | None:
        """Selections left to the kernel's hash, because no slot with a socket was found."""

    def open(self, slot: int) -> int | None:
        """The number of open connections of a slot."""

    def busy(self) -> Set[int] | None:
        """The slots that have open connections; None if something is not counted, as datagrams are
        not. This is cheap."""

    def pulse(self) -> bytes | None:
        """A value that differs whenever a connection was opened or closed since the last call; None
        in the same cases as `busy`. This is cheap."""

    def policy_values(self) -> PolicyValues:
        """The parameters and counters of the policy."""

    def memory_bytes(self) -> int:
        """The kernel memory that its maps take."""


class ControllerSockets(Protocol):
    """Opens sockets of the controller in the groups of workers."""

    @property
    def backup(self) -> BackupListeners | None:
        """Where connections wait while there is no worker; None if they could not be moved then."""

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        """By bind, a socket through which workers join the group."""

    @property
    def controller_sockets(self) -> Sequence[socket.socket]:
        """All sockets of the controller."""

    def open_anchors(self) -> None:
        """Open anchors where they are of use, before any worker has a socket."""

    def renew_anchors(self, service: Service) -> None:
        """Adapt the anchors to another configuration."""


class Persistent(Protocol):
    """Stores what the next controller needs, and ends a backend."""

    def stored(self) -> tuple[object, Sequence[int]]:
        """What `restore` needs: a value for JSON, and descriptors."""

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        """Continue where an earlier controller stopped, and own its descriptors.

        Args:
            value, fds: what `stored` returned in the earlier controller.
            held: the duplicates that the backend held there, by slot; empty for slots whose workers
                have ended since, in the order in which they ended.
        """

    def reassert(self, sockets: Mapping[int, Mapping[int, socket.socket]]) -> None:
        """Complete what an earlier controller may have left incomplete when it was killed. Called
        after `restore`.

        Args:
            sockets: the sockets of all workers, by slot and bind.

        Raises:
            KernelError
        """

    def release(self) -> None:
        """The service ends: close all sockets, so that workers close theirs for good."""

    def close(self) -> None:
        """Close everything."""


class Backend(Members, Selector, Counters, ControllerSockets, Persistent, Protocol):
    """The groups of one service, on one backend."""

    name: str
    """Its name, as in `--backend`."""

    @property
    def notes(self) -> Sequence[str]:
        """What the backend cannot do on this machine, one sentence each."""
