"""Memory that programs read while we write it: the table, and what is known of each slot."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import time
from collections.abc import Mapping, Set

from steer import abi
from steer.loader.bpf_maps import Map

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}


_MEMBARRIER_CMD_GLOBAL = 1


_STORES_IN_ORDER = ("x86_64", "i686")


class Slots:
    """What is known of every slot beside its place in the table, shared with programs."""

    def __init__(self, slots_map: Map) -> None:
        self.map = slots_map
        self._memory = slots_map.memory()

    def begin(self, slot: int) -> int:
        """Somebody new gets the slot, with nothing open; its stamp.

        Another, as a process that the last one left behind may still have connections open.
        """
        _, given, stamp, flows, _ = self._at(slot)
        self._put(slot, 0, given, _after(stamp), flows, 0)
        self.set_open(slot, 0)
        return _after(stamp)

    def end(self, slot: int) -> None:
        """Nothing that was counted for it, or is known to be there, means who comes next."""
        pending, given, stamp, flows, _ = self._at(slot)
        self._put(slot, pending, given, _after(stamp), _after(flows), 0)

    def forget_flows(self, slot: int) -> None:
        """Flows known to be there are to be chosen for anew."""
        slot %= abi.SLOTS  # as programs take a number that is none
        at = abi.SLOTS_OFFSET + slot * abi.SLOT.size + _FLOWS_OFFSET
        (flows,) = struct.unpack_from("=H", self._memory, at)
        struct.pack_into("=H", self._memory, at, _after(flows))

    def open(self, slot: int) -> int:
        """Connections open there."""
        opened: int
        (opened,) = struct.unpack_from("=i", self._memory, abi.OPEN_OFFSET + 4 * slot)
        return max(0, opened)

    def busy(self, below: int) -> Set[int]:
        """The slots below this number that have connections open."""
        opened = self._memory[abi.OPEN_OFFSET : abi.OPEN_OFFSET + 4 * below]
        if opened.count(0) == len(opened):
            return frozenset()
        numbers = struct.unpack(f"={below}i", opened)
        return {slot for slot, number in enumerate(numbers) if number > 0}

    def pulse(self, below: int) -> bytes:
        """Another whenever a connection was opened at a slot below this number, or closed."""
        opened = self._memory[abi.OPEN_OFFSET : abi.OPEN_OFFSET + 4 * below]
        return opened + self._memory[abi.LOAD_BYTES - abi.PACE.size : abi.LOAD_BYTES]

    def set_open(self, slot: int, number: int) -> None:
        """Where they are not counted: what may stand for it, with all handshakes until now."""
        struct.pack_into("=I", self._memory, abi.SLOTS_OFFSET + slot * abi.SLOT.size, 0)
        for at in (abi.OPEN_OFFSET, 0):
            struct.pack_into("=I", self._memory, at + 4 * slot, number)

    def become(self, fd: int) -> None:
        """Stand for another map, as somebody else has left it; the descriptor is ours."""
        self._memory.close()
        self.map.become(fd)
        self._memory = self.map.memory()

    def close(self) -> None:
        self._memory.close()

    def _at(self, slot: int) -> tuple[int, ...]:
        at = abi.SLOTS_OFFSET + slot * abi.SLOT.size
        found: tuple[int, ...] = abi.SLOT.unpack_from(self._memory, at)
        return found

    def _put(self, slot: int, *values: int) -> None:
        abi.SLOT.pack_into(self._memory, abi.SLOTS_OFFSET + slot * abi.SLOT.size, *values)


_FLOWS_OFFSET = 10
"""Of `flows` in struct steer_slot."""


def _after(stamp: int) -> int:
    return (stamp + 1) & 0xFFFF


class Table:
    """The table that programs read, filled in place and published by one store.

    The buffer that is not active is written, then made active. A program that was
    running at a publication may still read the old buffer: before that one is written
    again, membarrier(2) waits until every such program has ended (its
    MEMBARRIER_CMD_GLOBAL is a synchronize_rcu(), kernel/sched/membarrier.c).
    """

    def __init__(self, table_map: Map) -> None:
        self.map = table_map
        self._memory = table_map.memory()
        (head,) = abi.HEAD.unpack_from(self._memory)
        self._active = int(head & abi.BUFFER_BYTES != 0)
        self._readers_may_remain = True
        self._publications = 0

    def forget(self) -> None:
        """Choose nobody, before any program runs."""
        nobody = abi.NO_SLOT.to_bytes(2, sys.byteorder)
        places = (abi.BUFFER_BYTES - abi.LENGTH.size) // len(nobody)
        self.fill({0: abi.LENGTH.pack(0, 0) + nobody * places})

    def rested(self) -> None:
        """No program has run since `PROGRAMS_END_S`."""
        self._readers_may_remain = False

    def fill(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` (offset in a buffer → bytes) into both buffers, before any program runs."""
        for buffer in (0, 1):
            self._write(buffer, parts)
        self._point_to(self._active)
        self._readers_may_remain = False

    def amend(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` into the buffer in use, where programs may find old and new mixed."""
        self._write(self._active, parts)

    def publish(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` into the idle buffer and make it active."""
        self.synchronize()
        idle = 1 - self._active
        self._write(idle, parts)
        if os.uname().machine not in _STORES_IN_ORDER:
            wait_for_programs()
        self._point_to(idle)
        self.begin_grace_period()

    def begin_grace_period(self) -> None:
        """Programs that run now may choose as before, be it by another table."""
        self._readers_may_remain = True
        self._publications += 1

    def synchronize(self) -> None:
        """Return once no program reads the buffer that was active before the last publication."""
        if self._readers_may_remain:
            wait_for_programs()
        self._readers_may_remain = False

    def grace_period(self) -> int | None:
        """The publication that the next one would wait for: see `grace_period_ended`. None if it
        would not wait."""
        return self._publications if self._readers_may_remain else None

    def grace_period_ended(self, publication: int) -> None:
        """Programs were waited for since that publication, by a call of `grace_period`."""
        if publication == self._publications:
            self._readers_may_remain = False

    def active(self) -> bytes:
        """The buffer in use."""
        base = self._base(self._active)
        return self._memory[base : base + abi.BUFFER_BYTES]

    def _point_to(self, buffer: int) -> None:
        """Make it the active one, by one store that tells how long it is, too."""
        length, ring = abi.LENGTH.unpack_from(self._memory, self._base(buffer))
        head = length << abi.LENGTH_BIT | ring << abi.RING_BIT | buffer * abi.BUFFER_BYTES
        self._memory[: abi.HEAD.size] = abi.HEAD.pack(head)
        self._active = buffer

    @staticmethod
    def _base(buffer: int) -> int:
        return abi.HEADER.size + buffer * abi.BUFFER_BYTES

    def _write(self, buffer: int, parts: Mapping[int, bytes]) -> None:
        base = self._base(buffer)
        for offset, data in parts.items():
            self._memory[base + offset : base + offset + len(data)] = data

    def close(self) -> None:
        self._memory.close()


PROGRAMS_END_S = 0.1
"""No program runs so long."""


def wait_for_programs() -> None:
    """Return once every BPF program that is running now has ended."""
    number = _MEMBARRIER.get(os.uname().machine)
    if number is None or ctypes.CDLL(None).syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        time.sleep(PROGRAMS_END_S)  # nohz_full kernels refuse
