"""A group of sockets for programs that start their processes themselves: `steer.ReuseportGroup`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Self

from steer.api import group_input
from steer.api.slots import SlotCounts, Slots
from steer.backends import anchors
from steer.config import planning
from steer.config.service import Service, changed
from steer.errors import GroupError
from steer.linux import topology
from steer.loader import find
from steer.sockets import port_checks, reuseport

_NO_PARAMS: Mapping[str, int] = {}


class ReuseportGroup:
    """Sockets that share an address (SO_REUSEPORT, socket(7)); a policy in the kernel chooses.

    A slot is a place for a socket. Make the socket with `listen`, or `add` one; give it to whoever
    serves, a thread, a child or another process; `activate` the slot when that is ready. As long
    as no slot is active the kernel's hash chooses among all sockets there are.

    The group keeps no socket open, but on the backend cbpf: so one whose process dies is out of it
    at once, and others get what it would have got. `remove` frees its slot. On cbpf a socket is out
    only then, so there `remove` has to follow at once.

    The object belongs to the process that made it: pass sockets to others, by fork(2),
    multiprocessing or `socket.send_fds`. A child that was forked has the group's descriptors, and
    all sockets made before: it calls `close`, and closes the sockets that are not its own. It may
    be used by one thread at a time. It starts no thread and handles no signal.

    Use it as a context manager, or `close` it, when the sockets are gone. If some are left, they
    are chosen as before, but nothing can be changed and no open connections are counted.

    Args:
        address: "127.0.0.1:8000", "[::1]:8000", ":8000", "udp://127.0.0.1:8000". Port 0 is
            one that is free.
        policy: "auto", a built-in's name (see `steer policies`), or the path of a C file.
        slots: how many, 1 to 1024.
        params: of the policy, by name.
        backend: "auto" for the best that works here, or the best to try: "ebpf", "cbpf", "kernel".

    Raises:
        ConfigError: an argument cannot be; it names what is allowed.
        BindError: no port is free at the address; else `listen` is who finds that out.
        KernelError: no backend works, or a policy of your own is not right.
    """

    def __init__(
        self,
        address: str,
        policy: str = "auto",
        *,
        slots: int,
        params: Mapping[str, int] = _NO_PARAMS,
        backend: str = "auto",
    ) -> None:
        bind = group_input.bind_of(address)
        asked = {"policy": policy, "params": group_input.pairs(params), "backend": backend}
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
        became = [self._slots.plan.became] if self._slots.plan.became else []
        return (*became, *self._slots.backend.notes, *map(str, anchors.notes([self._bind], {})))

    def listen(
        self, slot: int, *, weight: int = 1, cpu: int | None = None, backlog: int = 2048
    ) -> socket.socket:
        """A new socket in the slot, bound, and over TCP listening, with TCP_NODELAY, which its
        connections have too (tcp(7)). It is yours to close.

        Args:
            slot: from 0 on; free, or (only ebpf sees that) its socket has been closed.
            weight: its share is in proportion, 1 to 1000.
            cpu: under the policy cpu, what comes in on that CPU is for this slot. If not given,
                slots are dealt the CPUs that this process may use, in turn. Nobody is pinned:
                that is for who serves, see os.sched_setaffinity().
            backlog: of listen(2): how many connections may wait.

        Raises:
            GroupError: the slot is not one of the group's, or taken; see the class.
            ConfigError: weight or CPU cannot be.
            BindError: bind(2) refused, or somebody else was there before the first.
            KernelError: the backend could not take it in.
        """
        self._check_usable()
        self._slots.make_free(slot, cpu)
        settings = self._slots.plan.service.settings
        if not self._slots.was_joined:
            port_checks.check_free(self._bind, settings)
        try:
            sock = reuseport.member(self._bind, backlog, settings=settings)
        except OSError as error:
            raise port_checks.bind_error(self._bind, error) from None
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

        On cbpf all sockets that are at the address have to be added, in the order in which they
        began to listen, over UDP were bound. Connections are counted if the socket was made in
        the cgroup of this process (cgroups(7)).

        Args: as `listen`.

        Raises: as `listen`; GroupError: it is not bound to the address, has no SO_REUSEPORT, or
            over TCP does not listen.
        """
        self._check_usable()
        self._slots.make_free(slot, cpu)
        group_input.check_socket(sock, self._bind, f"add to {self._slots.label(slot)}")
        self._slots.join(slot, sock, weight, cpu)

    def activate(self, *slots: int) -> None:
        """Have these chosen from now on. May take 25 ms if who is chosen was changed just before,
        as may all that changes it (membarrier(2)).

        Raises:
            GroupError: no socket has joined there; see the class.
            KernelError
        """
        self._check_usable(*slots)
        self._slots.choose(self._slots.active.union(slots))

    def drain(self, *slots: int) -> None:
        """Have these chosen no more; what they have, and what waits there, stays.

        On the backend kernel they are chosen all the same, as all are while no slot is active.

        Raises: as `activate`.
        """
        self._check_usable(*slots)
        self._slots.choose(self._slots.active.difference(slots))

    def migrate(self, slot: int, sock: socket.socket) -> int:
        """Move what waits to be accepted at a drained slot to active ones. Nobody should accept
        there meanwhile: who waits for the listener may see an error (EINVAL of accept(2)).

        Args:
            sock: the slot's socket.

        Returns:
            Connections that wait there still: all where the backend moves none, see `notes`.

        Raises:
            GroupError: the slot is active, no other is, it is not such a socket, or it is UDP.
            KernelError
        """
        self._check_usable(slot)
        group_input.check_socket(sock, self._bind, f"migrate {self._slots.label(slot)}")
        return self._slots.migrate(slot, sock)

    def remove(self, slot: int) -> None:
        """Free the slot, after its socket was closed or its process has ended.

        On cbpf this takes the socket out of the group, whoever has it open.

        Raises: as `activate`.
        """
        self._check_usable(slot)
        self._slots.leave(slot)

    def set_policy(self, policy: str, params: Mapping[str, int] = _NO_PARAMS) -> None:
        """Choose by another policy from now on, on the same backend, at one moment for all.

        Args: as of the class.

        Raises:
            ConfigError: there is none, or not on this backend; nothing has changed.
            KernelError: the kernel refuses, or a policy of your own is not right; the same.
            GroupError: see the class.
        """
        self._check_usable()
        act = f"set the policy of {self._bind.label} to {policy}"
        asked = {"policy": policy, "params": group_input.pairs(params)}
        service = changed(self._slots.plan.service, asked, act)
        self._slots.set_policy(service, find.find(policy), act)

    def counts(self) -> dict[int, SlotCounts]:
        """What the kernel counted for each slot in use. Raises GroupError, KernelError."""
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

    def __reduce__(self) -> str:
        raise GroupError(f"pickle the group at {self._bind.label}", *_NOT_THE_GROUP)

    def _check_usable(self, *slots: int) -> None:
        """Raises GroupError: not closed, not in another process, not without sockets. Memory that
        is shared with the kernel is not in a child (MADV_DONTFORK): it would crash."""
        act = f"use the group at {self._bind.label}"
        if self._is_closed:
            raise GroupError(act, "it is closed", "make another")
        if os.getpid() != self._pid:
            cause, cure = _NOT_THE_GROUP
            raise GroupError(act, f"{cause}, {self._pid}", f"{cure}; only close() works here")
        self._slots.check_taken(slots)


_NOT_THE_GROUP = "it belongs to the process that made it", "pass the sockets, not the group"
