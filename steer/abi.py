"""Numbers and structs shared with the kernel and with bpf/steer.h.

This module has only what must agree with C: the layouts of steer.h, which a test compares with the
compiled header, and numbers of the kernel's UAPI that the standard library lacks.
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
BPF_MAP_TYPE_HASH: Final = 1
BPF_MAP_TYPE_ARRAY: Final = 2
BPF_MAP_TYPE_PERCPU_ARRAY: Final = 6
BPF_MAP_TYPE_LRU_HASH: Final = 9
BPF_MAP_TYPE_SOCKMAP: Final = 15
BPF_MAP_TYPE_REUSEPORT_SOCKARRAY: Final = 20
BPF_MAP_TYPE_SK_STORAGE: Final = 24
BPF_MAP_TYPE_RINGBUF: Final = 27
BPF_PROG_TYPE_CGROUP_SOCK: Final = 9
BPF_PROG_TYPE_SOCK_OPS: Final = 13
BPF_PROG_TYPE_SK_REUSEPORT: Final = 21
BPF_PROG_TYPE_TRACING: Final = 26
BPF_CGROUP_SOCK_OPS: Final = 3
BPF_CGROUP_INET4_POST_BIND: Final = 12
BPF_CGROUP_INET6_POST_BIND: Final = 13
BPF_TRACE_RAW_TP: Final = 23
BPF_TRACE_FEXIT: Final = 25
BPF_TRACE_ITER: Final = 28
BPF_CGROUP_INET_SOCK_RELEASE: Final = 34
BPF_SK_REUSEPORT_SELECT: Final = 39
BPF_SK_REUSEPORT_SELECT_OR_MIGRATE: Final = 40
BPF_F_NO_PREALLOC: Final = 1 << 0
BPF_F_CLONE: Final = 1 << 9
BPF_F_MMAPABLE: Final = 1 << 10
BPF_LD_IMM64: Final = 0x18
BPF_PSEUDO_MAP_FD: Final = 1
BPF_PSEUDO_MAP_VALUE: Final = 2

# bpf/steer.h
ENTRIES: Final = 65536
TURNS: Final = 32768
FALLBACKS: Final = 256
BACKUPS: Final = 2
ROW: Final = 0x8000
NO_SLOT: Final = 0x7FFF
SLOTS: Final = 8192
MAX_SLOTS: Final = 4096
SCAN_MAX: Final = 64
"""Mirrors bpf/least-conn.c: a ring of up to this length is scanned completely."""
NEIGHBOURS: Final = 4
"""Mirrors bpf/least-conn.c: adjacent positions that are compared at once."""
VALUES: Final = 16
HISTOGRAMS: Final = 4
BUCKETS: Final = 32

HEADER: Final = struct.Struct("=QII")
"""Mirrors the first fields of struct steer_table: head, early, reserved."""
HEAD: Final = struct.Struct("=Q")
RING_BIT: Final = 20
LENGTH_BIT: Final = 40
COUNT: Final = struct.Struct("=QQQ")
"""Mirrors struct steer_counts: selected, fallback, migrated."""
CPU: Final = struct.Struct("=QIIQ")
"""Mirrors struct steer_cpu: turns, random, reserved, unsteered."""

SLOT: Final = struct.Struct("=IIHHI")
"""Mirrors struct steer_slot: pending, last_selected, stamp, flows, reserved."""
PACE: Final = struct.Struct("=QQIIII")
"""Mirrors struct steer_pace: mean, square, varied, selected, refreshed, moved."""
OWNER: Final = struct.Struct("=HHI")
"""Mirrors struct steer_owner: slot, stamp, since."""
LOAD_SIZE: Final = 4
OPEN_OFFSET: Final = SLOTS * LOAD_SIZE
SLOTS_OFFSET: Final = 2 * OPEN_OFFSET
LOAD_BYTES: Final = SLOTS_OFFSET + SLOTS * SLOT.size + PACE.size
"""Mirrors sizeof(struct steer_loads): load, open, slots, pace."""
PARAMS: Final = struct.Struct(f"=IIII{VALUES}I")
"""Mirrors struct steer_params: ticks_per_s, second, seed, backup, values."""
OWN: Final = struct.Struct(f"={VALUES + HISTOGRAMS * BUCKETS}Q")
"""Mirrors struct steer_own: the counters, then the buckets of each histogram."""
PACKET_BYTES: Final = 24
EARLY_BYTES: Final = 8
"""Mirror sizeof(struct steer_packet) and sizeof(struct steer_early)."""
FLOWS_OF_SET: Final = 8
SET_BYTES: Final = 192
"""Mirrors sizeof(struct flow_set) of bpf/flow.c. On average a set has FLOWS_OF_SET flows."""

ATTACHMENT: Final = struct.Struct(f"=Q6I{SLOTS}s")
"""Mirrors struct steer_attachment: alive_ns, port, netns, port_offset, net_offset, netns_offset,
reserved, closing."""
OFFSETS_OFFSET: Final = 16
"""Mirrors the offset of the first offset in struct steer_attachment."""
CLOSING_OFFSET: Final = ATTACHMENT.size - SLOTS
ABANDONED_S: Final = 1.0
"""Mirrors STEER_ABANDONED_NS."""

LENGTH: Final = struct.Struct("=II")
"""Mirrors the first fields of struct steer_layout: length, ring."""

ENTRIES_OFFSET: Final = LENGTH.size
TURNS_OFFSET: Final = ENTRIES_OFFSET + 2 * ENTRIES
FALLBACKS_OFFSET: Final = TURNS_OFFSET + 2 * TURNS
BUFFER_BYTES: Final = FALLBACKS_OFFSET + 2 * FALLBACKS
TABLE_BYTES: Final = HEADER.size + 2 * BUFFER_BYTES


CONSTANTS: Final = {"protocol": 0x57EE0100}
"""Placeholders in the bytecode for numbers that are known when it is loaded."""
PROTOCOLS: Final = {"tcp": 6, "udp": 17}
"""Protocol numbers of IP headers."""


MAPS_VERSION: Final = 1
"""The version of MAPS. Raise it when a map changes its shape, as controllers adopt older maps."""


class MapSpec(msgspec.Struct, frozen=True):
    """A map that steer.h uses.

    Args:
        number: placeholder for its file descriptor in the bytecode.
        kind: BPF_MAP_TYPE_*.
        value_bytes: size of a value.
        entries: capacity, or None if it is set when the map is created.
    """

    number: int
    kind: int
    value_bytes: int
    entries: int | None = 1
    flags: int = 0
    key_bytes: int = 4


MAPS: Final = {
    "sockets": MapSpec(0x57EE0001, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, 8, None),
    "table": MapSpec(0x57EE0002, BPF_MAP_TYPE_ARRAY, TABLE_BYTES, flags=BPF_F_MMAPABLE),
    "counts": MapSpec(0x57EE0003, BPF_MAP_TYPE_PERCPU_ARRAY, COUNT.size, None),
    "cpus": MapSpec(0x57EE0004, BPF_MAP_TYPE_PERCPU_ARRAY, CPU.size),
    "slots": MapSpec(0x57EE0005, BPF_MAP_TYPE_ARRAY, LOAD_BYTES, flags=BPF_F_MMAPABLE),
    "params": MapSpec(0x57EE0006, BPF_MAP_TYPE_ARRAY, PARAMS.size, flags=BPF_F_MMAPABLE),
    "own": MapSpec(0x57EE0007, BPF_MAP_TYPE_PERCPU_ARRAY, OWN.size),
    "flows": MapSpec(0x57EE0008, BPF_MAP_TYPE_ARRAY, SET_BYTES, None),
    "owners": MapSpec(
        0x57EE0009, BPF_MAP_TYPE_SK_STORAGE, OWNER.size, 0, BPF_F_NO_PREALLOC | BPF_F_CLONE
    ),
    "listeners": MapSpec(0x57EE000A, BPF_MAP_TYPE_HASH, OWNER.size, None, BPF_F_NO_PREALLOC, 8),
    "moved": MapSpec(0x57EE000B, BPF_MAP_TYPE_HASH, OWNER.size, 65536, BPF_F_NO_PREALLOC, 8),
    "early": MapSpec(0x57EE000C, BPF_MAP_TYPE_LRU_HASH, EARLY_BYTES, 1024, 0, PACKET_BYTES),
}
ATTACH_MAPS: Final = {
    "attachment": MapSpec(0x57EE0301, BPF_MAP_TYPE_ARRAY, ATTACHMENT.size, flags=BPF_F_MMAPABLE),
    "members": MapSpec(0x57EE0302, BPF_MAP_TYPE_HASH, 4, None, BPF_F_NO_PREALLOC, 8),
    "events": MapSpec(0x57EE0303, BPF_MAP_TYPE_RINGBUF, 0, 4096, key_bytes=0),
}
"""Maps of `steer attach`, which no other process ever gets."""

# bpf/tracing.h
OFFSETS: Final = 52
"""Numbers in struct steer_offsets."""
SOCKET: Final = struct.Struct("=QQQQQQQIIIIIIIIIIIIIHHHHHHBBB1x16s8s16s4x")
"""Struct steer_socket; its fields are those of `kernel_sockets.KernelSocket`, in that order."""
TRACING_MAPS: Final = {
    "offsets": MapSpec(0x57EE0201, BPF_MAP_TYPE_ARRAY, 4 * OFFSETS),
    "marks": MapSpec(0x57EE0202, BPF_MAP_TYPE_SK_STORAGE, 8, 0, BPF_F_NO_PREALLOC | BPF_F_CLONE),
    "accepted": MapSpec(0x57EE0203, BPF_MAP_TYPE_HASH, 8, None, BPF_F_NO_PREALLOC, 8),
    "wanted": MapSpec(0x57EE0204, BPF_MAP_TYPE_HASH, 4, None, BPF_F_NO_PREALLOC, 8),
}
"""What bpf/tracing.h speaks of: maps of one look, which no other process ever gets."""
ALL_MAPS: Final = {**MAPS, **ATTACH_MAPS, **TRACING_MAPS}
