"""steer.abi against what it mirrors: bpf/steer.h and the kernel's headers, as the compiler sees
them. A policy that stores one number after the other is compiled, and they are read from its
bytecode."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from steer import abi
from steer.kernel import compile

HEADS = {
    "steer_table": (abi.HEADER, "active reserved"),
    "steer_half": (abi.LENGTH, "length reserved"),
    "steer_count": (abi.COUNT, "selected fallback migrated"),
    "steer_cpu": (abi.CPU, "turn turn_ack random reserved unsteered"),
}
"""The fields that Python packs and unpacks, in their order."""

MIRRORED = {
    # bpf/steer.h
    "STEER_ENTRIES": abi.ENTRIES,
    "STEER_TURNS": abi.TURNS,
    "STEER_SPARES": abi.SPARES,
    "STEER_ROW": abi.ROW,
    "sizeof(struct steer_table)": abi.TABLE_BYTES,
    "sizeof(struct steer_half)": abi.HALF_BYTES,
    "sizeof(struct steer_count)": abi.COUNT.size,
    "sizeof(struct steer_cpu)": abi.CPU.size,
    "OFFSET(steer_table, halves)": abi.HEADER.size,
    "OFFSET(steer_half, entries)": abi.ENTRIES_OFFSET,
    "OFFSET(steer_half, turns)": abi.TURNS_OFFSET,
    "OFFSET(steer_half, spares)": abi.SPARES_OFFSET,
    "SIZE(steer_half, entries[0])": struct.calcsize("H"),
    "SIZE(steer_half, turns[0])": struct.calcsize("H"),
    "SIZE(steer_half, spares[0])": struct.calcsize("H"),
    "STEER_MAP_SOCKETS": abi.MAPS["sockets"].number,
    "STEER_MAP_TABLE": abi.MAPS["table"].number,
    "STEER_MAP_COUNTS": abi.MAPS["counts"].number,
    "STEER_MAP_CPUS": abi.MAPS["cpus"].number,
    # include/uapi/linux/bpf.h
    "BPF_MAP_TYPE_ARRAY": abi.BPF_MAP_TYPE_ARRAY,
    "BPF_MAP_TYPE_PERCPU_ARRAY": abi.BPF_MAP_TYPE_PERCPU_ARRAY,
    "BPF_MAP_TYPE_REUSEPORT_SOCKARRAY": abi.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY,
    "BPF_PROG_TYPE_SK_REUSEPORT": abi.BPF_PROG_TYPE_SK_REUSEPORT,
    "BPF_SK_REUSEPORT_SELECT": abi.BPF_SK_REUSEPORT_SELECT,
    "BPF_SK_REUSEPORT_SELECT_OR_MIGRATE": abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE,
    "BPF_F_MMAPABLE": abi.BPF_F_MMAPABLE,
    "BPF_PSEUDO_MAP_FD": abi.BPF_PSEUDO_MAP_FD,
    "BPF_PSEUDO_MAP_VALUE": abi.BPF_PSEUDO_MAP_VALUE,
}

ASKING = """
#include "steer.h"
#define OFFSET(type, field) __builtin_offsetof(struct type, field)
#define SIZE(type, field) sizeof(((struct type *)0)->field)

int steer_plain(struct sk_reuseport_md *ctx)
{
	volatile u32 number;

	%s
	return 0;
}

int steer_migrate(struct sk_reuseport_md *ctx)
{
	return 0;
}
"""

_MOV_IMM, _STORE_32 = 0xB7, 0x63


def fields() -> Iterator[tuple[str, int]]:
    """Where each field starts and how large it is, as the struct module has it."""
    for name, (packed, names) in HEADS.items():
        order, *codes = packed.format
        for index, field in enumerate(names.split()):
            before = struct.calcsize(order + "".join(codes[:index]))
            yield f"OFFSET({name}, {field})", before
            yield f"SIZE({name}, {field})", struct.calcsize(codes[index])


def compiled(expressions: Sequence[str], directory: Path) -> list[int]:
    """What the compiler makes of constant expressions."""
    source = directory / "asking.c"
    source.write_text(ASKING % "\n\t".join(f"number = {each};" for each in expressions))
    code = compile.compile_source(source).programs["plain"]
    registers, stored = {}, []
    for line in code.instructions:
        insn, both, _, value = struct.unpack("=BBhi", bytes.fromhex(line))
        if insn == _MOV_IMM:
            registers[both & 15] = value
        elif insn == _STORE_32:
            stored.append(registers[both >> 4])
    return stored


@pytest.mark.needs("bcc")
def test_layouts_and_numbers_are_those_of_the_headers(tmp_path: Path) -> None:
    expected = {**MIRRORED, **dict(fields())}
    found = compiled(list(expected), tmp_path)
    assert dict(zip(expected, found, strict=True)) == expected


def test_maps_hold_what_the_structs_say() -> None:
    sizes = {name: spec.value_bytes for name, spec in abi.MAPS.items()}
    assert sizes == {
        "sockets": 8,  # bpf_fd_reuseport_array_update_elem() takes an fd of 8 bytes, or 4
        "table": abi.TABLE_BYTES,
        "counts": abi.COUNT.size,
        "cpus": abi.CPU.size,
    }
    # Per-CPU values are read back to back, and the kernel rounds each up to 8.
    assert sizes["counts"] % 8 == sizes["cpus"] % 8 == 0


def test_slots_fit_an_entry() -> None:
    assert abi.MAX_SLOTS <= abi.NO_SLOT < abi.ROW
    assert abi.TURNS <= abi.ROW


@pytest.mark.needs("headers")
def test_socket_options_are_the_kernels() -> None:
    header = Path("/usr/include/asm-generic/socket.h")
    numbers = dict(re.findall(r"#define (SO_\w+)\s+(\d+)", header.read_text()))
    for name in (
        "SO_ATTACH_REUSEPORT_CBPF",
        "SO_ATTACH_REUSEPORT_EBPF",
        "SO_DETACH_REUSEPORT_BPF",
    ):
        assert getattr(abi, name) == int(numbers[name])
