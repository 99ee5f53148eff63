"""Anchors: sockets of the controller that hold UDP groups together while workers open connected
sockets at the same address.

`reuseport.anchor` explains why they are needed. They are opened before the first worker, because no
other socket may be at the address yet. They receive nothing, so they must never be selected. Where
only the kernel's hash selects, there are none.
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
"""The number of an anchor where sockets are listed by slot; fillers have lower numbers."""


class Anchors(Mapping[int, socket.socket]):
    """The anchors of one service by bind, and fillers, which are further anchors (see `fill`)."""

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
        """Open an anchor for each bind that needs one. If that fails the bind has none: an error in
        the address shows when the first worker starts.

        In the cgroup of a VRF there are none, because sockets stay bound to its interface there.
        """
        if members.usual_device() or is_left_to_hash(service):
            return
        for index, bind in enumerate(binds):
            # An address of an interface, as fe80::1%eth0, cannot be bound to another one.
            if may_split(bind) and not bind.is_scoped:
                try:
                    self._sockets[index] = reuseport.anchor(bind)
                except OSError:
                    continue

    def renew(self, index: int, bind: Bind) -> None:
        """Replace an anchor by a new one, over IPv4 only.

        The kernel looks at the newest socket of an address first, over IPv6 at the oldest. So the
        anchor has to be the newest over IPv4, for two reasons. The next bind(2) could otherwise
        find a socket that a worker has bound to the loopback interface. And for a datagram from
        the loopback interface the anchor is the better match: if a connected socket ever was in
        the group, the kernel would run the program for another socket first, look further, and run
        it again for the anchor.

        In the kernel's array the new anchor gets the place of the old one, if that is the first.
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
        """Open a filler: an anchor at the end of the kernel's array. The kernel moves it to the
        place of the next socket that leaves.

        Returns:
            Its number; None if it cannot be opened.
        """
        number = min(self.fillers(index), default=ANCHOR) - 1
        try:
            self._fillers[index, number] = reuseport.anchor(bind)
        except OSError:
            return None
        return number

    def fillers(self, index: int) -> list[int]:
        """The numbers of the fillers of a bind, in the order in which `drop` removes them."""
        return [number for at, number in self._fillers if at == index]

    def empty_one(self, index: int) -> int | None:
        """Remove the latest filler of a bind; its number, or None if there is none."""
        number = min(self.fillers(index), default=None)
        if number is not None:
            _take_out(self._fillers.pop((index, number)))
        return number

    def receive(self, binds: Iterable[int], fds: Iterable[int]) -> None:
        """Continue with the anchors of an earlier controller, and own its descriptors."""
        found = {bind: socket.socket(fileno=fd) for bind, fd in zip(binds, fds, strict=True)}
        self._sockets.update(found)

    @property
    def filled(self) -> list[tuple[int, int]]:
        """The bind and number of each filler, in the order of `all`."""
        return list(self._fillers)

    def receive_fillers(self, keys: Iterable[tuple[int, int]], fds: Iterable[int]) -> None:
        """Continue with the fillers of an earlier controller, and own its descriptors."""
        for key, fd in zip(keys, fds, strict=True):
            self._fillers[key] = socket.socket(fileno=fd)

    def close(self) -> None:
        """Take all anchors and fillers out of their groups, so that the kernel's hash does not
        select them, even while the guard has them open."""
        for index in list(self._sockets):
            self.drop(index)

    def drop(self, index: int) -> None:
        """Take the anchor and the fillers of one bind out of their group."""
        _take_out(self._sockets.pop(index))
        for number in self.fillers(index):
            _take_out(self._fillers.pop((index, number)))


def _take_out(sock: socket.socket) -> None:
    with sock, suppress(OSError):
        reuseport.take_out(sock)


def is_left_to_hash(service: Service) -> bool:
    """Whether the kernel's hash selects without asking a program, as it does for TPROXY over UDP
    (see `sockopt.shortfalls`)."""
    return any(each.name == "transparent" and each.value for each in service.settings)


def may_split(bind: Bind) -> bool:
    """Whether the group may be split when a worker opens a connected socket at the address. At a
    wildcard address it is not: the connected socket has a specific address."""
    return bind.protocol == "udp" and not bind.is_wildcard


def is_at_risk(at: int, bind: Bind, anchors: Mapping[int, object]) -> bool:
    """Whether the group of bind number `at` may be split."""
    return may_split(bind) and at not in anchors and not members.connected_stay()


def notes(binds: Sequence[Bind], anchors: Mapping[int, object]) -> list[Note]:
    """A note for each bind whose group may be split."""
    return [
        Note(
            f"{bind.label}: if workers open connected sockets there, as DTLS servers do, a worker "
            "that starts later gets all new clients until all are replaced",
            cure(bind),
        )
        for at, bind in enumerate(binds)
        if is_at_risk(at, bind, anchors)
    ]


def cure(bind: Bind) -> str:
    """What would keep the group from being split."""
    everywhere = "udp://[::]" if bind.is_v6 else "udp://0.0.0.0"
    return f"bind {everywhere}:{bind.port}, or start on ebpf or cbpf without transparent=yes"
