"""Classic BPF programs for a reuseport group, which need no privilege. Pure.

Such a program returns an index into the kernel's array of the group's sockets
(net/core/sock_reuseport.c). So this module also models the order of that array. A classic program
keeps no state and counts nothing.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from steer.policy.layout import Layout
from steer.values import plural

Insn = tuple[int, int, int, int]
"""The fields code, jt, jf and k of struct sock_filter."""

MAX_INSNS = 4096
HASH_LENGTH = 768
"""Positions of the hash table. For each the kernel makes up to three instructions of 8 bytes, and
before Linux 6.8 the limit is 20,480 bytes (net.core.optmem_max)."""

# include/uapi/linux/filter.h, include/uapi/linux/bpf_common.h
_LD_W_ABS, _LD_B_ABS, _LD_W_IND, _LDX_B_MSH = 0x20, 0x30, 0x40, 0xB1
_MUL_K, _MOD_K, _RSH_K, _AND_K, _XOR_K, _XOR_X = 0x24, 0x94, 0x74, 0x54, 0xA4, 0xAC
_ST, _LDX_MEM, _TAX = 0x02, 0x61, 0x07
_JA, _JEQ_K, _JGE_K, _RET_K = 0x05, 0x15, 0x35, 0x06
_AD_OFF, _NET_OFF = 0xFFFFF000, 0xFFF00000
_AD_CPU, _AD_RANDOM = _AD_OFF + 36, _AD_OFF + 56
_NO_SOCKET = 0xFFFFFFFF

NOTHING: Sequence[Insn] = ((_RET_K, 0, 0, 0),)
"""As a socket filter, this drops every packet."""

_INSN = struct.Struct("=HBBI")


class TooLong(ValueError):
    """A layout needs more instructions than the kernel accepts."""


class Order:
    """A model of the kernel's array of a group.

    Sockets are in the order of listen(), over UDP in the order of bind(). When a socket closes,
    the last one moves to its index.
    """

    def __init__(self, slots: Iterable[int] = ()) -> None:
        self._slots = list(slots)

    def joined(self, slot: int) -> None:
        self._slots.append(slot)

    def left(self, slot: int) -> None:
        place = self._slots.index(slot)
        last = self._slots.pop()
        if place < len(self._slots):
            self._slots[place] = last

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    @property
    def last(self) -> int | None:
        return self._slots[-1] if self._slots else None

    def indexes(self) -> dict[int, int]:
        return {slot: index for index, slot in enumerate(self._slots)}


class SeenOrder:
    """The known part of that order if sockets close by themselves.

    If two sockets close, it is unknown which closed first. So after a socket has left, the order
    is known only of those before it, and not of those after it or of those that join later.

    Args:
        slots: in order; None if the order is unknown.
    """

    def __init__(self, slots: Iterable[int] | None = ()) -> None:
        self._known: list[int] = list(slots or ())
        self._unknown: set[int] = set()
        self._is_whole = slots is not None

    def joined(self, slot: int) -> None:
        if self._is_whole:
            self._known.append(slot)
        else:
            self._unknown.add(slot)

    def left(self, slot: int) -> None:
        self._is_whole = False
        if slot in self._known:
            at = self._known.index(slot)
            self._unknown.update(self._known[at:])
            del self._known[at:]
        self._unknown.discard(slot)

    @property
    def slots(self) -> list[int] | None:
        """All slots in order; None if the order is unknown."""
        return None if self._unknown else list(self._known)


def by_cpu(layout: Layout, indexes: Mapping[int, int]) -> list[Insn]:
    """Selects the slot of the CPU. If a CPU has several, one is random, as turns need state."""
    rows: dict[int, list[Insn]] = {
        entry: _by_chance(layout.row(entry), indexes) for entry in set(layout.entries)
    }
    return _checked([(_LD_W_ABS, 0, 0, _AD_CPU), *_choose(_runs(layout.entries, rows))])


def by_share(layout: Layout, indexes: Mapping[int, int]) -> list[Insn]:
    """Selects a random slot, in exact proportion to the weights."""
    return _checked(_by_chance(layout.entries, indexes))


def by_hash(layout: Layout, indexes: Mapping[int, int], seed: int) -> list[Insn]:
    """Selects the slot by the hash of the flow."""
    return _hashed(_packet_hash(_FLOW_4, _FLOW_6, seed), layout, indexes)


def by_source(
    layout: Layout, indexes: Mapping[int, int], seed: int, prefix4: int, prefix6: int
) -> list[Insn]:
    """Selects the slot by the hash of a prefix of the client's address."""
    version_4 = [_address_word(12, prefix4)]
    version_6 = [_address_word(8 + 4 * i, prefix6 - 32 * i) for i in range(4)]
    return _hashed(_packet_hash(version_4, version_6, seed), layout, indexes)


def _hashed(number: Sequence[Insn], layout: Layout, indexes: Mapping[int, int]) -> list[Insn]:
    length = len(layout.entries)
    return _checked([*number, (_MOD_K, 0, 0, length), *_choose(_returns(layout.entries, indexes))])


def _address_word(at: int, bits: int) -> list[Insn]:
    """Loads a word at an offset in the IP header into A, with only its first `bits` set."""
    mask = 0xFFFFFFFF << 32 - min(max(bits, 0), 32) & 0xFFFFFFFF
    return [(_LD_W_ABS, 0, 0, _NET_OFF + at), (_AND_K, 0, 0, mask)]


def pack(program: Sequence[Insn]) -> bytes:
    """Encode a program as an array of struct sock_filter."""
    return b"".join(_INSN.pack(*insn) for insn in program)


def unpack(code: bytes) -> list[Insn]:
    """What `pack` has encoded."""
    return list(_INSN.iter_unpack(code))


def flow_hash(source: bytes, source_port: int, port: int, seed: int) -> int:
    """The hash that `by_hash` computes of a packet, for tests.

    Args:
        source: the client's address, 4 or 16 bytes.
        port: the destination port.
    """
    mixed = seed
    words = struct.unpack(f">{len(source) // 4}I", source)
    for word in (*words, source_port << 16 | port):
        mixed = (mixed ^ word) * 0x9E3779B1 & 0xFFFFFFFF
        mixed ^= mixed >> 15
    mixed = mixed * 0x85EBCA6B & 0xFFFFFFFF
    return mixed ^ mixed >> 13


_FLOW_4: Sequence[Sequence[Insn]] = (
    [(_LD_W_ABS, 0, 0, _NET_OFF + 12)],
    [(_LDX_B_MSH, 0, 0, _NET_OFF), (_LD_W_IND, 0, 0, _NET_OFF)],
)
_FLOW_6: Sequence[Sequence[Insn]] = [
    [(_LD_W_ABS, 0, 0, _NET_OFF + at)] for at in (8, 12, 16, 20, 40)
]
"""Each loads one word of the flow into A: the client's address, then the ports."""


def _packet_hash(
    version_4: Sequence[Sequence[Insn]], version_6: Sequence[Sequence[Insn]], seed: int
) -> list[Insn]:
    """Computes the hash of these words of the packet in A.

    The data start after the transport header, so headers are addressed relative to the network
    header. IPv6 extension headers are mistaken for ports, but they are the same in every packet
    of a flow that has them.
    """
    mixed_4, mixed_6 = _mix_all(version_4, seed), _mix_all(version_6, seed)
    return [
        (_LD_B_ABS, 0, 0, _NET_OFF),
        (_AND_K, 0, 0, 0xF0),
        (_JEQ_K, 0, len(mixed_6) + 1, 0x60),
        *mixed_6,
        (_JA, 0, 0, len(mixed_4)),
        *mixed_4,
        (_MUL_K, 0, 0, 0x85EBCA6B),
        (_TAX, 0, 0, 0),
        (_RSH_K, 0, 0, 13),
        (_XOR_X, 0, 0, 0),
    ]


def _mix_all(words: Sequence[Sequence[Insn]], seed: int) -> list[Insn]:
    """Mixes the seed and then each word into M[0]."""
    found: list[Insn] = []
    for load in words:
        start: list[Insn] = (
            [(_LDX_MEM, 0, 0, 0), (_XOR_X, 0, 0, 0)] if found else [(_XOR_K, 0, 0, seed)]
        )
        found += [
            *load,
            *start,
            (_MUL_K, 0, 0, 0x9E3779B1),
            (_TAX, 0, 0, 0),
            (_RSH_K, 0, 0, 15),
            (_XOR_X, 0, 0, 0),
            (_ST, 0, 0, 0),
        ]
    return found


def _by_chance(slots: Sequence[int], indexes: Mapping[int, int]) -> list[Insn]:
    if len(set(slots)) == 1:
        return _return(slots[0], indexes)
    return [
        (_LD_W_ABS, 0, 0, _AD_RANDOM),
        (_MOD_K, 0, 0, len(slots)),
        # The order does not matter for a random selection; sorted slots make the fewest runs.
        *_choose(_returns(sorted(slots), indexes)),
    ]


def _return(slot: int, indexes: Mapping[int, int]) -> list[Insn]:
    """Returns the slot's index, or one out of range, with which the kernel's hash selects."""
    return [(_RET_K, 0, 0, indexes.get(slot, _NO_SOCKET))]


def _returns(
    slots: Sequence[int] | array[int], indexes: Mapping[int, int]
) -> list[tuple[int, list[Insn]]]:
    return _runs(slots, {slot: _return(slot, indexes) for slot in set(slots)})


def _runs(
    values: Sequence[int] | array[int], code: Mapping[int, list[Insn]]
) -> list[tuple[int, list[Insn]]]:
    """The start of each run of equal values, and its code."""
    runs, start = [], 0
    for value, run in groupby(values):
        runs.append((start, code[value]))
        start += sum(1 for _ in run)
    return runs


def _choose(runs: Sequence[tuple[int, list[Insn]]]) -> list[Insn]:
    """Finds the run that contains A by binary search."""
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    low, high = _choose(runs[:middle]), _choose(runs[middle:])
    if len(low) < 256:
        return [(_JGE_K, len(low), 0, runs[middle][0]), *low, *high]
    return [(_JGE_K, 0, 1, runs[middle][0]), (_JA, 0, 0, len(low)), *low, *high]


def _checked(program: list[Insn]) -> list[Insn]:
    if len(program) > MAX_INSNS:
        raise TooLong(
            f"{plural(len(program), 'instruction')}; the limit of classic BPF is {MAX_INSNS}"
        )
    return program
