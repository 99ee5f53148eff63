"""Memory shared with BPF programs: the table, and the state of each slot."""

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
    """The state of every slot, shared with programs. Mirrors struct steer_loads."""

    def __init__(self, slots_map: Map) -> None:
        self.map = slots_map
        self._mapping = slots_map.memory()

    def begin(self, slot: int) -> int:
        """Prepare a slot for a new worker without open connections. Returns its stamp.

        The stamp is new, as a process of the previous worker may still have open connections.
        """
        _, given, stamp, flows, _ = self._at(slot)
        self._put(slot, 0, given, _after(stamp), flows, 0)
        self.set_open(slot, 0)
        return _after(stamp)

    def stamp(self, slot: int) -> int:
        """The stamp that `begin` gave the slot."""
        return self._at(slot)[2]

    def end(self, slot: int) -> None:
        """Invalidate counts and flows of a slot's worker, which the next one must not get."""
        pending, given, stamp, flows, _ = self._at(slot)
        self._put(slot, pending, given, _after(stamp), _after(flows), 0)

    def forget_flows(self, slot: int) -> None:
        """Forget the flows of a slot, so that each is assigned again."""
        slot %= abi.SLOTS  # as programs do with a number out of range
        at = abi.SLOTS_OFFSET + slot * abi.SLOT.size + _FLOWS_OFFSET
        (flows,) = struct.unpack_from("=H", self._memory, at)
        struct.pack_into("=H", self._memory, at, _after(flows))

    def open(self, slot: int) -> int:
        """The open connections of a slot."""
        opened: int
        (opened,) = struct.unpack_from("=i", self._memory, abi.OPEN_OFFSET + 4 * slot)
        return max(0, opened)

    def busy(self, below: int) -> Set[int]:
        """The slots below this number that have open connections."""
        opened = bytes(self._memory[abi.OPEN_OFFSET : abi.OPEN_OFFSET + 4 * below])
        if opened.count(0) == len(opened):
            return frozenset()
        numbers = struct.unpack(f"={below}i", opened)
        return {slot for slot, number in enumerate(numbers) if number > 0}

    def pulse(self, below: int) -> bytes:
        """A value that changes when a slot below this number opens or closes a connection."""
        opened = bytes(self._memory[abi.OPEN_OFFSET : abi.OPEN_OFFSET + 4 * below])
        return opened + bytes(self._memory[abi.LOAD_BYTES - abi.PACE.size : abi.LOAD_BYTES])

    def set_open(self, slot: int, number: int) -> None:
        """Set the load of a slot, and its open connections to the same, if they are not counted.

        Its handshakes in progress are reset, as the number is assumed to include them.
        """
        struct.pack_into("=I", self._memory, abi.SLOTS_OFFSET + slot * abi.SLOT.size, 0)
        for at in (abi.OPEN_OFFSET, 0):
            struct.pack_into("=I", self._memory, at + 4 * slot, number)

    def become(self, fd: int) -> None:
        """Replace the map by that of an earlier controller. Takes ownership of `fd`."""
        self._mapping.close()
        self.map.become(fd)
        self._mapping = self.map.memory()

    def close(self) -> None:
        self._mapping.close()

    @property
    def _memory(self) -> memoryview:
        return self._mapping.view

    def _at(self, slot: int) -> tuple[int, ...]:
        at = abi.SLOTS_OFFSET + slot * abi.SLOT.size
        found: tuple[int, ...] = abi.SLOT.unpack_from(self._memory, at)
        return found

    def _put(self, slot: int, *values: int) -> None:
        abi.SLOT.pack_into(self._memory, abi.SLOTS_OFFSET + slot * abi.SLOT.size, *values)


_FLOWS_OFFSET = 10
"""The offset of `flows` in struct steer_slot."""


def _after(stamp: int) -> int:
    return (stamp + 1) & 0xFFFF


class Table:
    """The double-buffered table that programs read, published by one store.

    To publish is to write the inactive buffer and then make it active. A program that was running
    at a publication may still read the old buffer. So before that is written again, membarrier(2)
    waits until every such program has ended (MEMBARRIER_CMD_GLOBAL is a synchronize_rcu(),
    kernel/sched/membarrier.c).
    """

    def __init__(self, table_map: Map) -> None:
        self.map = table_map
        self._mapping = table_map.memory()
        (head,) = abi.HEAD.unpack_from(self._memory)
        self._active = int(head & abi.BUFFER_BYTES != 0)
        self._readers_may_remain = True
        self._publications = 0

    def clear(self) -> None:
        """Clear the table, before any program runs: no position has a slot."""
        nobody = abi.NO_SLOT.to_bytes(2, sys.byteorder)
        places = (abi.BUFFER_BYTES - abi.LENGTH.size) // len(nobody)
        self.fill({0: abi.LENGTH.pack(0, 0) + nobody * places})

    def assume_no_readers(self) -> None:
        """Note that no program has run for `PROGRAMS_END_S`, so publish() need not wait."""
        self._readers_may_remain = False

    def fill(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` (offset in a buffer → bytes) into both buffers, before any program runs."""
        for buffer in (0, 1):
            self._write(buffer, parts)
        self._point_to(self._active)
        self._readers_may_remain = False

    def amend(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` into the active buffer, where programs may read old and new data mixed."""
        self._write(self._active, parts)

    def publish(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` into the inactive buffer and make it active."""
        self.synchronize()
        idle = 1 - self._active
        self._write(idle, parts)
        if os.uname().machine not in _STORES_IN_ORDER:
            wait_for_programs()
        self._point_to(idle)
        self.begin_grace_period()

    def begin_grace_period(self) -> None:
        """Note that programs which run now may still select by an older table."""
        self._readers_may_remain = True
        self._publications += 1

    def synchronize(self) -> None:
        """Return once no program reads the buffer that was active before the last publication."""
        if self._readers_may_remain:
            wait_for_programs()
        self._readers_may_remain = False

    def grace_period(self) -> int | None:
        """The publication that the next one has to wait for, or None.

        Pass it to `grace_period_ended` after waiting.
        """
        return self._publications if self._readers_may_remain else None

    def grace_period_ended(self, publication: int) -> None:
        """Note that all programs of that publication have ended."""
        if publication == self._publications:
            self._readers_may_remain = False

    def active(self) -> bytes:
        """The content of the active buffer."""
        base = self._base(self._active)
        return bytes(self._memory[base : base + abi.BUFFER_BYTES])

    @property
    def _memory(self) -> memoryview:
        return self._mapping.view

    def _point_to(self, buffer: int) -> None:
        """Make a buffer active. The one store to the head also sets the lengths."""
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
        self._mapping.close()


PROGRAMS_END_S = 0.1
"""No program runs that long."""


def wait_for_programs() -> None:
    """Return when every BPF program that is running now has ended."""
    number = _MEMBARRIER.get(os.uname().machine)
    if number is None or ctypes.CDLL(None).syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        time.sleep(PROGRAMS_END_S)  # kernels with nohz_full refuse the call
