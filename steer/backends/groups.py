"""The reuseport groups of a service as the kernel has them: maps for each, and an eBPF program."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import islice

from steer import abi
from steer.backends.base import Counts
from steer.errors import KernelError
from steer.loader import bpf_maps, libbpf
from steer.sockets import group_program


class GroupMaps:
    """The maps of one group, which stay when the policy changes.

    The turn counters of the CPUs start at different values. If they all started at 0, the first
    connection of every CPU would go to the first slot.

    Args:
        slots: how many slots the maps have.
        workers: how many of them workers have at the start.
        cpus: how many CPUs the machine may have.
        kind: of the map of sockets, BPF_MAP_TYPE_*.
    """

    def __init__(
        self,
        slots: int,
        workers: int,
        cpus: int,
        kind: int = abi.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY,
    ) -> None:
        kinds = {"sockets": kind, "counts": None, "cpus": None}
        with ExitStack() as undo:
            self.maps = {
                name: undo.enter_context(bpf_maps.Map(name, slots, each))
                for name, each in kinds.items()
            }
            self.sockets, self.counts, self.cpus = self.maps.values()
            starts = (workers * cpu // cpus for cpu in range(cpus))
            self.cpus.put(0, b"".join(abi.CPU.pack(at << 32 | at, _seed(), 0, 0) for at in starts))
            self.close = undo.pop_all().close


def _seed() -> int:
    """A seed for steer_random(), which would return 0 forever after a seed of 0."""
    return int.from_bytes(os.urandom(4)) | 1


class Groups:
    """The groups of one service; binds are given by their number in the plan.

    Args:
        binds: how many binds the service has.
        slots, workers, cpus, kind: see `GroupMaps`.

    Attributes:
        maps: for each bind, its maps by name.
    """

    def __init__(
        self,
        binds: int,
        slots: int,
        workers: int,
        cpus: int,
        kind: int = abi.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY,
    ) -> None:
        self._cpus = cpus
        self._groups: list[GroupMaps] = []
        with ExitStack() as undo:
            for _ in range(binds):
                self._groups.append(GroupMaps(slots, workers, cpus, kind))
                undo.callback(self._groups[-1].close)
            self.maps: Sequence[Mapping[str, bpf_maps.Map]] = [each.maps for each in self._groups]
            self.close = undo.pop_all().close

    def __len__(self) -> int:
        return len(self._groups)

    def put(self, bind: int, slot: int, fd: int) -> None:
        """Put a socket into the sockarray."""
        self._groups[bind].sockets.put_socket(slot, fd)

    def put_back(self, bind: int, slot: int, fd: int) -> None:
        """Put a socket into the sockarray, unless it is there already or does not listen."""
        try:
            self.put(bind, slot, fd)
        except KernelError as error:
            if error.errno not in (errno.EBUSY, errno.EINVAL):
                raise

    def remove(self, slots: Iterable[int]) -> None:
        """Remove the sockets in these slots from all sockarrays."""
        for slot in slots:
            for group in self._groups:
                group.sockets.delete(slot)

    def has(self, bind: int, slot: int) -> bool:
        """Whether the slot has a socket. The kernel removes one that leaves its group."""
        return self._groups[bind].sockets.has(slot)

    def counts(self, slot: int, bind: int | None = None) -> Counts:
        """What the programs have counted of a slot, at one bind or at all."""
        groups = self._groups if bind is None else [self._groups[bind]]
        raw = b"".join(group.counts.per_cpu(slot, self._cpus) for group in groups)
        columns = zip(*abi.COUNT.iter_unpack(raw), strict=True)
        return Counts(*(sum(column) for column in columns))

    def reset_counts(self, slot: int) -> None:
        for group in self._groups:
            group.counts.put(slot, bytes(abi.COUNT.size * self._cpus))

    def unsteered(self) -> int:
        """Selections that the programs left to the kernel's hash."""
        raw = b"".join(group.cpus.per_cpu(0, self._cpus) for group in self._groups)
        return sum(int(last) for *_, last in abi.CPU.iter_unpack(raw))

    def memory_bytes(self) -> int:
        return sum(each.memory_bytes() for maps in self.maps for each in maps.values())

    def descriptors(self) -> list[int]:
        """The descriptors of all maps, for `receive`."""
        return [each.fileno() for maps in self.maps for each in maps.values()]

    def receive(self, fds: Iterator[int]) -> None:
        """Replace the maps by those of an earlier controller.

        Args:
            fds: begins with what its `descriptors` returned. The maps close these.
        """
        for maps in self.maps:
            for each, fd in zip(maps.values(), islice(fds, len(maps)), strict=True):
                each.become(fd)


def attach_through(sock: int, program: libbpf.Descriptor) -> None:
    """Attach a program to the group of a socket. If that socket is locked, nothing happens: another
    socket of the group has to be used.

    Raises:
        KernelError
    """
    with suppress(group_program.Locked):
        group_program.attach_ebpf(sock, program.fileno())


def switch_programs(
    sockets: Mapping[int, socket.socket],
    programs: Sequence[libbpf.Descriptor],
    before: Sequence[libbpf.Descriptor],
) -> None:
    """Attach another program to every group.

    Args:
        sockets: by bind, one of each group that has any.
        programs: by bind, what to attach.
        before: by bind, what is attached now.

    Raises:
        KernelError: every group has its former program.
    """
    with ExitStack() as undo:
        for bind, sock in sockets.items():
            group_program.attach_ebpf(sock.fileno(), programs[bind].fileno())
            undo.callback(group_program.attach_ebpf, sock.fileno(), before[bind].fileno())
        undo.pop_all()
