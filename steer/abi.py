"""Numbers and structs shared with the kernel and with bpf/steer.h.

Only what has to agree with something outside Python stands here: the layouts
of steer.h (a test compiles the header and compares) and the numbers of the
kernel's UAPI that the standard library lacks.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

# include/uapi/asm-generic/socket.h; parisc and sparc have other numbers.
SO_ATTACH_REUSEPORT_CBPF: Final = 51
SO_ATTACH_REUSEPORT_EBPF: Final = 52
SO_DETACH_REUSEPORT_BPF: Final = 68

# include/uapi/linux/bpf.h
BPF_MAP_TYPE_ARRAY: Final = 2
BPF_MAP_TYPE_PERCPU_ARRAY: Final = 6
BPF_MAP_TYPE_REUSEPORT_SOCKARRAY: Final = 20
BPF_PROG_TYPE_SK_REUSEPORT: Final = 21
BPF_SK_REUSEPORT_SELECT: Final = 39
BPF_SK_REUSEPORT_SELECT_OR_MIGRATE: Final = 40
BPF_F_MMAPABLE: Final = 1 << 10
BPF_LD_IMM64: Final = 0x18
BPF_PSEUDO_MAP_FD: Final = 1
BPF_PSEUDO_MAP_VALUE: Final = 2

# bpf/steer.h
ENTRIES: Final = 65536
TURNS: Final = 32768
SPARES: Final = 256
ROW: Final = 0x8000
NO_SLOT: Final = 0x7FFF
MAX_SLOTS: Final = 4096

HEADER: Final = struct.Struct("=II")
"""Mirrors the head of struct steer_table: active, reserved."""
COUNT: Final = struct.Struct("=QQQ")
"""Mirrors struct steer_count: selected, fallback, migrated."""
CPU: Final = struct.Struct("=IIIIQ")
"""Mirrors struct steer_cpu: turn, turn_ack, random, reserved, unsteered."""

LENGTH: Final = struct.Struct("=II")
"""Mirrors the head of struct steer_half: length, reserved."""

ENTRIES_OFFSET: Final = LENGTH.size
TURNS_OFFSET: Final = ENTRIES_OFFSET + 2 * ENTRIES
SPARES_OFFSET: Final = TURNS_OFFSET + 2 * TURNS
HALF_BYTES: Final = SPARES_OFFSET + 2 * SPARES
TABLE_BYTES: Final = HEADER.size + 2 * HALF_BYTES


class MapSpec(msgspec.Struct, frozen=True):
    """A map that steer.h speaks of.

    Args:
        number: what stands in the bytecode in place of its file descriptor.
        kind: BPF_MAP_TYPE_*.
        value_bytes: size of a value.
        entries: how many, or None for one per slot.
    """

    number: int
    kind: int
    value_bytes: int
    entries: int | None
    flags: int = 0


MAPS: Final = {
    "sockets": MapSpec(0x57EE0001, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, 8, None),
    "table": MapSpec(0x57EE0002, BPF_MAP_TYPE_ARRAY, TABLE_BYTES, 1, BPF_F_MMAPABLE),
    "counts": MapSpec(0x57EE0003, BPF_MAP_TYPE_PERCPU_ARRAY, COUNT.size, None),
    "cpus": MapSpec(0x57EE0004, BPF_MAP_TYPE_PERCPU_ARRAY, CPU.size, 1),
}
