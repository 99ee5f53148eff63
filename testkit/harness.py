"""The sockets of a service without its processes: a backend, driven as the pool drives it.

What a worker would accept or receive is taken by the test itself, so that who got what is known
connection by connection.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, cast

from steer.backends.open import open_backend
from steer.config import address
from steer.config.address import Bind
from steer.config.planning import plan
from steer.config.service import Service
from steer.linux import topology
from steer.loader import find
from steer.policy.cpus import Topology
from steer.policy.layout import Member
from steer.sockets import reuseport
from testkit.processes import DEADLINE_S

CPUS = tuple(sorted(os.sched_getaffinity(0)))
PORT = 8080
KINDS = {
    "tcp4": f"127.0.0.1:{PORT}",
    "tcp6": f"[::1]:{PORT}",
    "udp4": f"udp://127.0.0.1:{PORT}",
    "udp6": f"udp://[::1]:{PORT}",
}
_BATCH = 64
"""So many on their way at once that no receive buffer and no backlog is full."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Run there only. What is sent over loopback is taken in by the same CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class Taken:
    """A connection or datagram, and whose socket it was taken from.

    Args:
        bind: which of the service's binds the socket is at.
        peer: the client's address and port.
    """

    slot: int
    bind: int
    peer: tuple[str, int]


class Harness:
    """A backend with a socket on every bind for each slot.

    Args:
        backend, policy: the backend is opened as it is, without a fallback.
        kinds: keys of KINDS, or addresses.
        workers: how many, in slots 0, 1, ...; their sockets are made by `join`.
        options: socket options of theirs, NAME=VALUE.
        new_socket: makes a client's socket, of a family and a kind.
    """

    def __init__(
        self,
        backend: str,
        policy: str,
        *kinds: str,
        workers: int = 4,
        weights: Sequence[int] = (),
        params: Sequence[str] = (),
        machine: Topology | None = None,
        options: Sequence[str] = (),
        new_socket: Callable[[int, int], socket.socket] = socket.socket,
    ) -> None:
        bind = tuple(KINDS.get(kind, kind) for kind in kinds)
        service = Service(
            policy=policy,
            workers=workers,
            bind=bind,
            weights=tuple(weights),
            params=tuple(params),
            socket_options=tuple(options),
        )
        self._new_socket = new_socket
        self.plan = plan(service, machine or topology.read(), {}, find.find(policy))
        self.binds = self.plan.binds
        self.sockets: dict[int, list[socket.socket]] = {}
        self.backend = open_backend(backend, self.plan)
        self._ready = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for slot in list(self.sockets):
            self.close_sockets(slot)
        self._ready.close()
        self.backend.close()

    # What the pool does.

    def serving(self) -> Self:
        """All workers joined and selected."""
        self.join(*range(len(self.plan.specs)))
        self.steer()
        return self

    def join(self, *slots: int) -> None:
        """A worker comes to each slot, in this order."""
        for slot in slots:
            self.sockets[slot] = [
                reuseport.member(
                    bind,
                    4096,
                    settings=self.plan.service.settings,
                    anchored=index in self.backend.anchors,
                )
                for index, bind in enumerate(self.binds)
            ]
            for index, sock in enumerate(self.sockets[slot]):
                sock.setblocking(False)
                self._ready.register(sock, selectors.EVENT_READ, (slot, index))
            self.backend.add_member(slot, [os.dup(sock.fileno()) for sock in self.sockets[slot]])

    def leave(self, *slots: int) -> None:
        """The worker ends, and then the controller is told."""
        for slot in slots:
            self.close_sockets(slot)
            self.backend.remove_member(slot)

    def close_sockets(self, slot: int) -> None:
        for sock in self.sockets.pop(slot):
            self._ready.unregister(sock)
            sock.close()

    def steer(self, *slots: int) -> None:
        """Choose among these, by default among all that are there."""
        self.backend.steer([self.member(slot) for slot in slots or sorted(self.sockets)])

    def member(self, slot: int) -> Member:
        if slot >= len(self.plan.specs):
            return Member(slot)
        spec = self.plan.specs[slot]
        return Member(slot, spec.weight, spec.cpu)

    # What clients do.

    def send(self, bind: Bind, source: tuple[str, int] = ("", 0), host: str = "") -> socket.socket:
        """A connection made, or a datagram sent, from a new socket.

        Args:
            source: to send from; any if not given.
            host: to send to, where the bind is for many addresses.
        """
        host = host or bind.address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        kind = socket.SOCK_DGRAM if bind.protocol == "udp" else socket.SOCK_STREAM
        client = self._new_socket(family, kind)
        try:
            client.settimeout(DEADLINE_S)
            if source != ("", 0):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind(source)
            if bind.protocol == "tcp":
                # No TIME_WAIT: the same source port is soon used again.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            client.connect((host, bind.port))
            if bind.protocol == "udp":
                client.send(b"x")
        except BaseException:
            client.close()
            raise
        return client

    def take(self, number: int) -> list[Taken]:
        """The next `number` connections and datagrams; no more may be there than these."""
        taken: list[Taken] = []
        while len(taken) < number:
            assert self._ready.select(DEADLINE_S), f"{len(taken)} of {number} arrived"
            taken += self.take_ready()
        assert len(taken) == number
        return taken

    def take_ready(self) -> list[Taken]:
        """Whatever is there."""
        ready = self._ready.select(0)
        return [
            each
            for key, _ in ready
            for each in self._take_all(cast(socket.socket, key.fileobj), *key.data)
        ]

    def _take_all(self, sock: socket.socket, slot: int, bind: int) -> Iterator[Taken]:
        try:
            while True:
                if sock.type == socket.SOCK_DGRAM:
                    _, peer = sock.recvfrom(16)
                else:
                    accepted, peer = sock.accept()
                    accepted.close()
                yield Taken(slot, bind, peer[:2])
        except BlockingIOError:
            return

    def exchange(
        self, sources: Iterable[tuple[str, int]], bind: int = 0, host: str = ""
    ) -> list[Taken]:
        """One connection or datagram from each source, in batches."""
        left, taken = list(sources), []
        while left:
            batch, left = left[:_BATCH], left[_BATCH:]
            clients = [self.send(self.binds[bind], source, host) for source in batch]
            taken += self.take(len(batch))
            for client in clients:
                client.close()
        return taken

    def count(self, number: int, bind: int = 0, host: str = "") -> Counter[int]:
        """How many of `number` each slot gets."""
        taken = self.exchange([("", 0)] * number, bind, host)
        assert {each.bind for each in taken} <= {bind}, "came to another group"
        return Counter(each.slot for each in taken)

    def sequence(self, number: int, bind: int = 0) -> list[int]:
        """The slots that get the next `number`, one after the other."""
        return [self.exchange([("", 0)], bind)[0].slot for _ in range(number)]

    def flows(
        self, sources: Iterable[tuple[str, int]], bind: int = 0, host: str = ""
    ) -> dict[tuple[str, int], int]:
        """The slot that each source's flow goes to."""
        return {each.peer: each.slot for each in self.exchange(sources, bind, host)}

    def selected(self) -> dict[int, int]:
        """What the kernel counted, by slot; slots with nothing left out."""
        counts = {slot: self.backend.counts(slot) for slot in range(self.plan.slots)}
        return {slot: count.selected for slot, count in counts.items() if count and count.selected}


def sources(host: str, number: int, first_port: int = 20000) -> list[tuple[str, int]]:
    """Addresses to send from."""
    return [(host, first_port + i) for i in range(number)]


def host_of(kind: str) -> str:
    return address.parse(KINDS[kind]).address
