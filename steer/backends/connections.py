"""Counts the open connections of each worker in the kernel; see bpf/open.c."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack

import msgspec

from steer import abi
from steer.config.address import Bind
from steer.errors import KernelError, Note
from steer.linux import cgroup
from steer.loader import bpf_maps, compile, libbpf, programs, shared_memory
from steer.sockets import listeners, reuseport


class StoredCounting(msgspec.Struct):
    """The cgroups that the program is attached to. What belongs to each slot is in the maps."""

    cgroups: list[int]


class Counting:
    """Counts the open connections of one service.

    The program is attached to every cgroup that this process was in when a worker started. A
    socket belongs for good to the cgroup that its creator was in (sk_cgrp_data, cgroup_sk_alloc()
    of kernel/cgroup/cgroup.c). So when the service is moved to another cgroup, connections of old
    workers are counted in the old one, and those of new workers in the new one. If one cgroup is
    below the other, the program runs twice for a connection, and counts it once. In the cgroup
    file system nothing is created, and the links end with their descriptors.

    Args:
        at_most: how many listeners there can be; with 0 nothing is counted.

    Attributes:
        slots: the memory that programs share with this process, also if nothing is counted.
        why_not: why nothing is counted; None if connections are counted.

    Raises:
        KernelError: the maps cannot be created.
    """

    def __init__(self, at_most: int) -> None:
        self.why_not: Note | None = None
        self._cookies: dict[int, list[int]] = {}
        self._cgroups: list[int] = []
        self._watched = ""
        self._owners: bpf_maps.Map | None = None
        self._attached: list[libbpf.Descriptor] = []
        with ExitStack() as undo:
            self._listeners = undo.enter_context(bpf_maps.Map("listeners", max(1, at_most)))
            self._moved = undo.enter_context(bpf_maps.Map("moved"))
            slots = undo.enter_context(bpf_maps.Map("slots"))
            self.slots = shared_memory.Slots(slots)
            undo.callback(self.slots.close)
            self.maps: Mapping[str, bpf_maps.Map] = {
                "slots": slots,
                "listeners": self._listeners,
                "moved": self._moved,
            }
            undo.callback(self._stop)
            if at_most:
                self._start()
            self.close: Callable[[], None] = undo.pop_all().close

    def _start(self) -> None:
        code = compile.load(compile.sources() / "open.c").programs["count"]
        try:
            self._owners = bpf_maps.Map("owners")
            maps = {**self.maps, "owners": self._owners}
            self._attached.append(
                programs.Program("steer_open", code, maps, abi.BPF_CGROUP_SOCK_OPS)
            )
            self._watch_ours()
        except cgroup.NoCgroup as error:
            self._stop()
            self.why_not = Note(error.cause, error.cure)
        except KernelError as error:
            self._stop()
            self.why_not = error.note
            if error.errno == errno.EPERM:
                self.why_not = error.note._replace(cure="needs CAP_BPF and CAP_NET_ADMIN")

    def _watch_ours(self) -> None:
        """Attach the program to the cgroup of this process, if it is not attached there yet.

        Raises:
            KernelError
        """
        name = cgroup.name()
        if name and name == self._watched:
            return
        with cgroup.own() as directory:
            number = os.fstat(directory).st_ino
            if number not in self._cgroups:
                self._attached.append(programs.Link(self._attached[0], directory))
                self._cgroups.append(number)
        self._watched = name

    def _follow(self) -> None:
        """Count in the cgroup where a worker that was just forked made its sockets."""
        if self._owners is None:
            return
        try:
            self._watch_ours()
        except KernelError as error:
            # If only some workers were counted, the others would get all new connections.
            self._stop()
            where = f"not in cgroup {cgroup.name()}, where this process is now"
            self.why_not = Note(f"{where}: {error.note.found}", error.cure, error.errno)

    def _stop(self) -> None:
        self._watched = ""
        while self._attached:
            self._attached.pop().close()
        if self._owners is not None:
            self._owners.close()
            self._owners = None

    def add_listeners(self, slot: int, fds: Sequence[int], binds: Sequence[Bind]) -> None:
        """Count the connections of a new worker, which has a socket for each bind."""
        self._follow()
        stamp = self.slots.begin(slot)
        for bind, fd in zip(binds, fds, strict=True):
            if bind.protocol == "tcp":
                self.add_listener(slot, fd, stamp)

    def add_listener(self, slot: int, fd: int, stamp: int) -> None:
        """Count connections to this listener for the worker in `slot`.

        Args:
            stamp: what `slots.begin` returned.
        """
        if self._owners is None:
            return
        value = abi.OWNER.pack(slot, stamp, 0)
        cookie = reuseport.cookie(fd)
        self._owners.put(fd, value)
        if is_empty(fd):
            # Otherwise connections wait that were not counted, and must not be when they migrate.
            self._listeners.put(cookie, value)
        self._cookies.setdefault(slot, []).append(cookie)

    def remove_listeners(self, slot: int) -> None:
        """The listeners of a slot are closed."""
        for cookie in self._cookies.pop(slot, ()):
            self._listeners.delete(cookie)

    def open(self, slot: int) -> int | None:
        return None if self._owners is None else self.slots.open(slot)

    def busy(self, below: int) -> Set[int] | None:
        """The slots below this number that have open connections; None if they are not counted."""
        return None if self._owners is None else self.slots.busy(below)

    def pulse(self, below: int) -> bytes | None:
        """See `Slots.pulse`; None if connections are not counted."""
        return None if self._owners is None else self.slots.pulse(below)

    def stored(self) -> tuple[StoredCounting, Sequence[int]]:
        """See `restore`."""
        kept: list[libbpf.Descriptor] = [self.slots.map, self._listeners, self._moved]
        if self._owners is not None:
            kept += [self._owners, *self._attached]
        return StoredCounting(self._cgroups), [each.fileno() for each in kept]

    def restore(self, saved: StoredCounting, fds: Sequence[int]) -> None:
        """Continue with maps and links of an earlier controller, and own its descriptors."""
        slots, listeners, moved, *counted = fds
        self.slots.become(slots)
        self._listeners.become(listeners)
        self._moved.become(moved)
        self._cgroups = saved.cgroups
        self._cookies = {}
        for cookie, value in self._listeners.items():
            slot, _, _ = abi.OWNER.unpack(value)
            self._cookies.setdefault(slot, []).append(cookie)
        self._stop()
        self.why_not = (
            None if counted else Note("the controller before this one did not count them either")
        )
        if counted:
            self._owners = bpf_maps.Map.received("owners", counted[0])
            self._attached = [libbpf.Descriptor(fd) for fd in counted[1:]]
            self._watch_ours()


def is_empty(fd: int) -> bool:
    """Whether no connection waits in a listener."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return not listeners.waiting(sock).queued
