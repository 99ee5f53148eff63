"""Programs to compare with, written out by hand: nothing in them is steer's.

Each only calls the helper that every choice ends with, on a
slot found as cheaply as can be in one of the ways that policies find theirs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from steer import abi
from steer.policy.bytecode import Code

_INSN = struct.Struct("=BBhi")
_HASH_OFFSET = 32
"""Of `hash` in struct sk_reuseport_md, include/uapi/linux/bpf.h."""
_SELECT = 82
"""BPF_FUNC_sk_select_reuseport."""
_READ = 68
"""BPF_FUNC_skb_load_bytes_relative, with BPF_HDR_START_NET 1."""
_SOURCE_OFFSET = 12
"""Of the source address in an IPv4 header."""


def _insn(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> str:
    return _INSN.pack(code, source << 4 | to, offset, value).hex()


def _map(register: int, kind: int) -> list[str]:
    return [_insn(abi.BPF_LD_IMM64, register, kind), _insn(0)]


def _spread(slots: int) -> list[str]:
    return [_insn(0x27, 0, value=slots), _insn(0x77, 0, value=32)]  # r0 *= slots; r0 >>= 32


_STATE = _map(5, abi.BPF_PSEUDO_MAP_VALUE)  # r5 = the first number of the table
_LOAD, _STORE = _insn(0x61, 0, 5), _insn(0x63, 5, 0)  # r0 = *r5; *r5 = r0
_PASS = [_insn(0xB7, 0, value=1), _insn(0x95)]  # r0 = SK_PASS; exit


def one_slot(_slots: int) -> Code:
    return _select([_insn(0xB7, 0, value=0)], {})


def by_hash(slots: int) -> Code:
    return _select([_insn(0x61, 0, 1, _HASH_OFFSET), *_spread(slots)], {})


def by_address(slots: int) -> Code:
    """Of IPv4, which another helper has to read."""
    read = [
        _insn(0xBF, 6, 1),  # r6 = ctx
        _insn(0xB7, 2, value=_SOURCE_OFFSET),
        _insn(0xBF, 3, 10),  # r3 = &address
        _insn(0x07, 3, value=-8),
        _insn(0xB7, 4, value=4),
        _insn(0xB7, 5, value=1),
        _insn(0x85, value=_READ),
        _insn(0x61, 0, 10, -8),  # r0 = address
        _insn(0xBF, 1, 6),
    ]
    return _select([*read, *_spread(slots)], {})


def in_turn(slots: int) -> Code:
    add, below, first = _insn(0x07, 0, value=1), _insn(0xA5, 0, 0, 1, slots), _insn(0xB7, 0)
    return _select([*_STATE, _LOAD, add, below, first, _STORE], {0: "table"})


def by_chance(slots: int) -> Code:
    """With a linear congruential generator, Numerical Recipes' ranqd1."""
    step = [_insn(0x24, 0, value=1664525), _insn(0x04, 0, value=1013904223)]
    return _select([*_STATE, _LOAD, *step, _STORE, *_spread(slots)], {0: "table"})


def _select(choice: Sequence[str], relocations: dict[int, str]) -> Code:
    """bpf_sk_select_reuseport() of the slot that `choice` leaves in r0."""
    call = [
        _insn(0x63, 10, 0, -4),  # slot = r0
        *_map(2, abi.BPF_PSEUDO_MAP_FD),
        _insn(0xBF, 3, 10),  # r3 = &slot
        _insn(0x07, 3, value=-4),
        _insn(0xB7, 4),  # r4 = 0, no flags
        _insn(0x85, value=_SELECT),
    ]
    return Code([*choice, *call, *_PASS], {**relocations, len(choice) + 1: "sockets"})
