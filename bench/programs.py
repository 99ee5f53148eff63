"""Programs to compare with, written out by hand: nothing in them is steer's."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from steer import abi
from steer.bytecode import Code

_INSN = struct.Struct("=BBhi")
_HASH_OFFSET = 32
"""Of `hash` in struct sk_reuseport_md, include/uapi/linux/bpf.h."""
_SELECT = 82
"""BPF_FUNC_sk_select_reuseport."""


def _insn(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> str:
    return _INSN.pack(code, source << 4 | to, offset, value).hex()


def _map(register: int, kind: int) -> list[str]:
    return [_insn(abi.BPF_LD_IMM64, register, kind), _insn(0)]


_PASS = [_insn(0xB7, 0, value=1), _insn(0x95)]  # r0 = SK_PASS; exit

EMPTY = Code(_PASS, {})


def one_slot() -> Code:
    return _helper([_insn(0xB7, 0, value=0)], {})


def by_hash(slots: int) -> Code:
    return _helper(
        [
            _insn(0x61, 0, 1, _HASH_OFFSET),  # r0 = ctx->hash
            _insn(0x27, 0, value=slots),  # r0 *= slots
            _insn(0x77, 0, value=32),  # r0 >>= 32
        ],
        {},
    )


def in_turn(slots: int) -> Code:
    """With the first number of the table as counter.

    Args:
        slots: a power of two.
    """
    return _helper(
        [
            *_map(5, abi.BPF_PSEUDO_MAP_VALUE),
            _insn(0x61, 0, 5),  # r0 = *r5
            _insn(0xBF, 4, 0),  # r4 = r0
            _insn(0x07, 4, value=1),  # r4 += 1
            _insn(0x63, 5, 4),  # *r5 = r4
            _insn(0x57, 0, value=slots - 1),  # r0 &= slots - 1
        ],
        {0: "table"},
    )


def _helper(choice: Sequence[str], relocations: dict[int, str]) -> Code:
    """bpf_sk_select_reuseport() of the slot that `choice` leaves in r0."""
    at = len(choice) + 1
    call = [
        _insn(0x63, 10, 0, -4),  # slot = r0
        *_map(2, abi.BPF_PSEUDO_MAP_FD),
        _insn(0xBF, 3, 10),  # r3 = &slot
        _insn(0x07, 3, value=-4),
        _insn(0xB7, 4, value=0),  # r4 = flags
        _insn(0x85, value=_SELECT),
    ]
    return Code([*choice, *call, *_PASS], {**relocations, at: "sockets"})
