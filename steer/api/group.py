"""A group of sockets for programs that start their processes themselves: `steer.ReuseportGroup`."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping
from typing import Self

import msgspec

from steer.api import arguments, group_input
from steer.api.slots import SlotCounts, Slots
from steer.config import planning
from steer.config.service import Service
from steer.config.sources import changed
from steer.errors import GroupError
from steer.linux import topology
from steer.loader import find

_MAX_BACKLOG = 2**31 - 1
"""The kernel lowers it to net.core.somaxconn."""


class ReuseportGroup:
    """Sockets that share an address (SO_REUSEPORT, socket(7)); a policy in the kernel selects one
    of them for each connection or datagram.

    A slot holds one socket. Make the socket with `listen`, or `add` one of yours. Give the socket
    to the thread or process that serves it, and `activate` the slot when that is ready. While no
    slot is active, the kernel's hash selects among all sockets at the address.

    On the backends ebpf and kernel the group keeps no socket open: if the process that serves a
    socket dies, the socket leaves the group at once, and the others get its share. `remove` then
    frees the slot. On cbpf the group keeps sockets open, so a socket leaves it only by `remove`:
    call that as soon as the process has ended.

    The object belongs to the process that made it. Pass sockets to other processes, by fork(2),
    multiprocessing or `socket.send_fds`. A forked child inherits the group's descriptors and the
    sockets made so far: call `close` in the child, and close the sockets that it does not serve.
    Only one thread at a time may use the object. The object starts no thread and handles no signal.

    Use it as a context manager, or `close` it when the sockets are closed. Sockets that are still
    open then are selected as before, but nothing can be changed and open connections are no longer
    counted.

    Args:
        address: "127.0.0.1:8000", "[::1]:8000", ":8000" or "udp://127.0.0.1:8000". Port 0 means a
            free port.
        policy: "auto", the name of a built-in policy (see `steer policies`), or the path of a C
            file.
        slots: the number of slots, 1 to 1024.
        params: the parameters of the policy, by name. None: their defaults.
        backend: "auto" for the best that works here; or the best to try: "ebpf", "cbpf" or
            "kernel".

    Raises:
        ConfigError: an argument is wrong; the error says what is allowed.
        BindError: no port is free at the address. A given port is first checked by `listen`.
        KernelError: no backend works, or a custom policy does not compile or load.
    """

    def __init__(
        self,
        address: str,
        policy: str = "auto",
        *,
        slots: int,
        params: Mapping[str, int] | None = None,
        backend: str = "auto",
    ) -> None:
        bind = group_input.bind_of(address)
        pairs = arguments.parameters(params, "ReuseportGroup")
        asked = {"policy": policy, "params": pairs, "backend": backend}
        where = {"bind": [group_input.text_of(bind)], "workers": group_input.count_of(slots)}
        service = changed(Service(), {**asked, **where}, "ReuseportGroup")
        self._slots = Slots(planning.plan(service, topology.read(), {}, find.find(policy)))
        self._bind = bind
        self._pid = os.getpid()
        self._is_closed = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, as socket.create_connection() takes them."""
        return self._bind.address, self._bind.port

    @property
    def policy(self) -> str:
        """The name of the policy in force; for "auto", the policy that it became."""
        return self._slots.plan.policy.name

    @property
    def backend(self) -> str:
        """The backend in force: "ebpf", "cbpf" or "kernel"."""
        return self._slots.backend.name

    @property
    def reason(self) -> str | None:
        """Why a better backend is not used; None: there is no better one for the policy."""
        return self._slots.reason

    @property
    def notes(self) -> tuple[str, ...]:
        """In words, what this backend cannot do here, and why "auto" became this policy."""
        return tuple(self._slots.notes())

    def listen(
        self, slot: int, *, weight: int = 1, cpu: int | None = None, backlog: int = 2048
    ) -> socket.socket:
        """Make a socket in the slot. It is bound; a TCP socket also listens, and its connections
        have TCP_NODELAY (tcp(7)). The caller closes it.

        Args:
            slot: the number of a free slot, from 0. On ebpf a slot whose socket has been closed
                counts as free, too.
            weight: the share of the slot, 1 to 1000, relative to the weights of the others.
            cpu: under the policy cpu, the slot gets the packets that arrive on this CPU. None:
                slots take turns at the CPUs that this process may use. steer pins no process:
                a server can pin itself with os.sched_setaffinity().
            backlog: the length of the accept queue, as in listen(2).

        Raises:
            GroupError: there is no such slot, it is taken, or the group is closed or belongs to
                another process.
            ConfigError: the weight, the CPU or the backlog is wrong.
            BindError: bind(2) failed, or another process had the port before the first socket.
            KernelError: the backend could not add the socket.
        """
        self._check_usable()
        arguments.whole_number("backlog", backlog, "listen", least=0, most=_MAX_BACKLOG)
        self._slots.make_free(slot, weight, cpu)
        sock = self._slots.new_socket(backlog)
        try:
            self._slots.join(slot, sock, weight, cpu)
        except BaseException:
            sock.close()
            raise
        return sock

    def add(
        self, slot: int, sock: socket.socket, *, weight: int = 1, cpu: int | None = None
    ) -> None:
        """Put a socket of yours into the slot.

        On cbpf, add all sockets at the address, in the order in which they began to listen; UDP
        sockets in the order in which they were bound. The connections of the socket are counted
        if it was made in the cgroup of this process (cgroups(7)).

        Args: as for `listen`.

        Raises: as `listen`. Also GroupError: the socket is in another slot, is not bound to the
            address, has no SO_REUSEPORT, or is a TCP socket that does not listen.
        """
        self._check_usable()
        self._slots.make_free(slot, weight, cpu)
        group_input.check_socket(sock, self._bind, f"add to {self._slots.label(slot)}")
        self._slots.join(slot, sock, weight, cpu)

    def activate(self, *slots: int) -> None:
        """Start to select these slots. This and every other change of the active slots may take
        25 ms if another change was made just before (membarrier(2)).

        Raises:
            GroupError: a slot has no socket, or the group is closed or belongs to another process.
            KernelError
        """
        self._check_usable(*slots)
        self._slots.select_from(self._slots.active.union(slots))

    def drain(self, *slots: int) -> None:
        """Stop selecting these slots. They keep their connections and their accept queues.

        The backend kernel continues to select them, as it cannot leave a socket out. If no slot is
        left active, every backend selects all sockets.

        Raises: as `activate`.
        """
        self._check_usable(*slots)
        self._slots.select_from(self._slots.active.difference(slots))

    def migrate(self, slot: int, sock: socket.socket) -> int:
        """Move the accept queue of a drained slot to active slots. Do not accept from its socket
        meanwhile: accept(2) may fail with EINVAL.

        Args:
            sock: the slot's socket.

        Returns:
            The number of connections that still wait in the queue. If the backend cannot migrate,
            that is all of them; `notes` then says so.

        Raises:
            GroupError: the slot is active, no slot is active, the socket is not that of the slot,
                or the group is UDP.
            KernelError
        """
        self._check_usable(slot)
        group_input.check_socket(sock, self._bind, f"migrate {self._slots.label(slot)}")
        return self._slots.migrate(slot, sock)

    def remove(self, slot: int) -> None:
        """Free the slot after its socket was closed or its process has ended.

        On cbpf this also takes the socket out of the group, even if a process has it open.

        Raises: as `activate`.
        """
        self._check_usable(slot)
        self._slots.leave(slot)

    def set_policy(self, policy: str, params: Mapping[str, int] | None = None) -> None:
        """Switch to another policy on the same backend, atomically. After an error nothing has
        changed.

        Args: as for the class.

        Raises:
            ConfigError: there is no such policy, or it does not run on this backend.
            KernelError: the kernel refuses the policy, or a custom policy does not compile.
            GroupError: the group is closed or belongs to another process.
        """
        self._check_usable()
        act = f"set the policy of {self._bind.label} to {policy}"
        asked = {"policy": policy, "params": arguments.parameters(params, act)}
        without_weights = msgspec.structs.replace(self._slots.plan.service, weights=())
        self._slots.set_policy(changed(without_weights, asked, act), find.find(policy), act)

    def counts(self) -> dict[int, SlotCounts]:
        """The kernel's counts for each slot that has a socket. Raises GroupError, KernelError."""
        self._check_usable()
        return self._slots.counts()

    def close(self) -> None:
        """Close everything that this process has of the group, except your sockets. This also works
        in a forked child. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._slots.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        """As files and sockets do: warn, and close what would stay open until the process ends."""
        if not getattr(self, "_is_closed", True):
            what = f"unclosed group at {self._bind.label}"
            warnings.warn(what, ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __reduce__(self) -> str:
        raise GroupError(f"pickle the group at {self._bind.label}", *_NOT_THE_GROUP)

    def _check_usable(self, *slots: int) -> None:
        """Check that the group is open, belongs to this process, and has a socket in each slot.
        A child would crash: the memory shared with programs is not mapped in it (MADV_DONTFORK).

        Raises:
            GroupError
        """
        act = f"use the group at {self._bind.label}"
        if self._is_closed:
            raise GroupError(act, "it is closed", "make another")
        if os.getpid() != self._pid:
            cause, cure = _NOT_THE_GROUP
            raise GroupError(act, f"{cause}, {self._pid}", f"{cure}; only close() works here")
        self._slots.check_taken(slots)


_NOT_THE_GROUP = "it belongs to the process that made it", "pass the sockets, not the group"
