"""Sockets of ours that hold UDP groups together while workers open others at the same address.

See `reuseport.anchor` for why. They are opened before the first worker, as no other socket may
be there yet, and are never chosen: nothing that comes to them is taken in. So where the
kernel's hash alone chooses, there are none.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from steer.config.address import Bind
from steer.config.service import Service
from steer.errors import Note
from steer.sockets import members, reuseport

ANCHOR = -1
"""Its number, in the place of a slot, in the kernel's array; those of fillers are lower."""


class Anchors(Mapping[int, socket.socket]):
    """Of one service, by bind; and fillers, which are more of them, see `fill`."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._fillers: dict[tuple[int, int], socket.socket] = {}

    def __getitem__(self, bind: int) -> socket.socket:
        return self._sockets[bind]

    def __iter__(self) -> Iterator[int]:
        return iter(self._sockets)

    def __len__(self) -> int:
        return len(self._sockets)

    def open(self, binds: Sequence[Bind], service: Service) -> None:
        """One for each bind that has use for one; where it cannot be had, none.

        What is wrong with an address the first worker tells. Sockets of a VRF's cgroup are bound
        to its interface, and stay so.
        """
        if members.usual_device() or is_left_to_hash(service):
            return
        for index, bind in enumerate(binds):
            # One of an interface, as fe80::1%eth0, cannot be bound to another.
            if may_split(bind) and not bind.is_scoped:
                try:
                    self._sockets[index] = reuseport.anchor(bind)
                except OSError:
                    continue

    def renew(self, index: int, bind: Bind) -> None:
        """Another in its place, as it has to be newer than all others at its address, because
        the kernel looks at the newest first. Over IPv6 it looks at the oldest first, which is
        the anchor.

        Who binds next might else find one that a worker has bound to the loopback. And to a
        datagram from there the anchor is nearer than a socket of any interface: where a connected
        socket ever was in the group the kernel would run the program for one of these, look
        further, and run it again for the anchor.

        In the kernel's array the new one is in the place of the old one, if it is the first.
        """
        if index in self._sockets and not bind.is_v6:
            with suppress(OSError):
                fresh = reuseport.anchor(bind)
                reuseport.take_out(self._sockets[index])
                self._sockets[index].close()
                self._sockets[index] = fresh

    @property
    def all(self) -> list[socket.socket]:
        return [*self._sockets.values(), *self._fillers.values()]

    def fill(self, index: int, bind: Bind) -> int | None:
        """Open another one behind all sockets of the kernel's array, to move into the hole of the
        next that leaves; its number there, or None where it cannot be had."""
        number = min(self.fillers(index), default=ANCHOR) - 1
        try:
            self._fillers[index, number] = reuseport.anchor(bind)
        except OSError:
            return None
        return number

    def fillers(self, index: int) -> list[int]:
        """Numbers of those of a bind, in the order in which `drop` takes them out."""
        return [number for at, number in self._fillers if at == index]

    def empty_one(self, index: int) -> int | None:
        """Take the latest filler of a bind out; its number, or None where there is none."""
        number = min(self.fillers(index), default=None)
        if number is not None:
            _take_out(self._fillers.pop((index, number)))
        return number

    def receive(self, binds: Iterable[int], fds: Iterable[int]) -> None:
        """Go on with those that another controller opened; the descriptors become ours."""
        found = {bind: socket.socket(fileno=fd) for bind, fd in zip(binds, fds, strict=True)}
        self._sockets.update(found)

    @property
    def filled(self) -> list[tuple[int, int]]:
        """The bind and number of each filler, in the order of `all`."""
        return list(self._fillers)

    def receive_fillers(self, keys: Iterable[tuple[int, int]], fds: Iterable[int]) -> None:
        """The same as `receive`."""
        for key, fd in zip(keys, fds, strict=True):
            self._fillers[key] = socket.socket(fileno=fd)

    def close(self) -> None:
        """The kernel's hash may choose from here on: have it choose none of them, also while
        the guard still has them open."""
        for index in list(self._sockets):
            self.drop(index)

    def drop(self, index: int) -> None:
        """The same of one bind."""
        _take_out(self._sockets.pop(index))
        for number in self.fillers(index):
            _take_out(self._fillers.pop((index, number)))


def _take_out(sock: socket.socket) -> None:
    with sock, suppress(OSError):
        reuseport.take_out(sock)


def is_left_to_hash(service: Service) -> bool:
    """Whether the kernel's hash chooses, whatever the program: over UDP it does for TPROXY (see
    `sockopt.shortfalls`)."""
    return any(each.name == "transparent" and each.value for each in service.settings)


def may_split(bind: Bind) -> bool:
    """Whether its group may come apart when a worker opens a connected socket there. At a
    wildcard that has an address of its own."""
    return bind.protocol == "udp" and not bind.is_wildcard


def is_at_risk(at: int, bind: Bind, anchors: Mapping[int, object]) -> bool:
    """Whether the group of a service's bind number `at` may come apart."""
    return may_split(bind) and at not in anchors and not members.connected_stay()


def notes(binds: Sequence[Bind], anchors: Mapping[int, object]) -> list[Note]:
    """What is to be known of such binds."""
    return [
        Note(
            f"{bind.label}: if workers open connected sockets there, as servers of DTLS do, one "
            "that starts later gets all new clients until all are replaced",
            cure(bind),
        )
        for at, bind in enumerate(binds)
        if is_at_risk(at, bind, anchors)
    ]


def cure(bind: Bind) -> str:
    """What would help, in words."""
    everywhere = "udp://[::]" if bind.is_v6 else "udp://0.0.0.0"
    return (
        f"{everywhere}:{bind.port} has no such trouble, nor has a start on ebpf or cbpf "
        "without transparent=yes"
    )
