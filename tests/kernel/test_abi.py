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
from steer.loader import compile, kernel_sockets
from steer.loader.kernel_sockets import KernelSocket

HEADS = {
    "steer_table": (abi.HEADER, "head early reserved"),
    "steer_layout": (abi.LENGTH, "length ring"),
    "steer_counts": (abi.COUNT, "selected fallback migrated"),
    "steer_cpu": (abi.CPU, "turns random reserved unsteered"),
    "steer_slot": (abi.SLOT, "pending last_selected stamp flows reserved"),
    "steer_owner": (abi.OWNER, "slot stamp since"),
    "steer_pace": (abi.PACE, "mean square varied selected refreshed moved"),
    "steer_params": (abi.PARAMS, "ticks_per_s second seed backup"),
    "steer_socket": (
        abi.SOCKET,
        " ".join(KernelSocket._fields).replace(" ip ", " reserved ip "),
    ),
}
"""The fields that Python packs and unpacks, in their order; arrays are in MIRRORED."""

UAPI = (
    "BPF_MAP_TYPE_",
    "BPF_PROG_TYPE_",
    "BPF_CGROUP_",
    "BPF_SK_",
    "BPF_TRACE_",
    "BPF_F_",
    "BPF_PSEUDO_",
)
MIRRORED = {
    # bpf/steer.h
    "STEER_ENTRIES": abi.ENTRIES,
    "STEER_TURNS": abi.TURNS,
    "STEER_FALLBACKS": abi.FALLBACKS,
    "STEER_BACKUPS": abi.BACKUPS,
    "STEER_RING_BIT": abi.RING_BIT,
    "STEER_LENGTH_BIT": abi.LENGTH_BIT,
    "STEER_ROW": abi.ROW,
    "sizeof(struct steer_table)": abi.TABLE_BYTES,
    "sizeof(struct steer_layout)": abi.BUFFER_BYTES,
    "sizeof(struct steer_counts)": abi.COUNT.size,
    "sizeof(struct steer_cpu)": abi.CPU.size,
    "OFFSET(steer_table, buffers)": abi.HEADER.size,
    "OFFSET(steer_layout, entries)": abi.ENTRIES_OFFSET,
    "OFFSET(steer_layout, turns)": abi.TURNS_OFFSET,
    "OFFSET(steer_layout, fallbacks)": abi.FALLBACKS_OFFSET,
    "STEER_SLOTS": abi.SLOTS,
    "STEER_VALUES": abi.VALUES,
    "STEER_HISTOGRAMS": abi.HISTOGRAMS,
    "STEER_BUCKETS": abi.BUCKETS,
    "sizeof(struct steer_slot)": abi.SLOT.size,
    "sizeof(struct steer_owner)": abi.OWNER.size,
    "sizeof(struct steer_pace)": abi.PACE.size,
    "sizeof(struct steer_loads)": abi.LOAD_BYTES,
    "OFFSET(steer_loads, open)": abi.OPEN_OFFSET,
    "OFFSET(steer_loads, slots)": abi.SLOTS_OFFSET,
    "sizeof(struct steer_params)": abi.PARAMS.size,
    "sizeof(struct steer_own)": abi.OWN.size,
    "sizeof(struct steer_packet)": abi.PACKET_BYTES,
    "sizeof(struct steer_early)": abi.EARLY_BYTES,
    "sizeof(struct steer_attachment)": abi.ATTACHMENT.size,
    "OFFSET(steer_attachment, alive_ns)": 0,
    "OFFSET(steer_attachment, port)": 8,
    "OFFSET(steer_attachment, netns)": 12,
    "OFFSET(steer_attachment, port_offset)": abi.OFFSETS_OFFSET,
    "OFFSET(steer_attachment, net_offset)": abi.OFFSETS_OFFSET + 4,
    "OFFSET(steer_attachment, netns_offset)": abi.OFFSETS_OFFSET + 8,
    "OFFSET(steer_attachment, closing)": abi.CLOSING_OFFSET,
    "STEER_ABANDONED_NS": int(abi.ABANDONED_S * 1e9),
    "OFFSET(steer_params, values)": struct.calcsize("4I"),
    "SIZE(steer_params, values)": struct.calcsize(f"{abi.VALUES}I"),
    "OFFSET(steer_own, counters)": 0,
    "SIZE(steer_own, counters)": struct.calcsize(f"{abi.VALUES}Q"),
    "OFFSET(steer_own, histograms)": struct.calcsize(f"{abi.VALUES}Q"),
    "SIZE(steer_own, histograms[0])": struct.calcsize(f"{abi.BUCKETS}Q"),
    "SIZE(steer_own, histograms)": struct.calcsize(f"{abi.HISTOGRAMS * abi.BUCKETS}Q"),
    # bpf/tracing.h
    "sizeof(struct steer_socket)": abi.SOCKET.size,
    "sizeof(struct steer_offsets)": 4 * abi.OFFSETS,
    **{
        f"OFFSET(steer_offsets, {name})": 4 * index
        for index, name in enumerate([*kernel_sockets.FIELDS, "pid_number_bytes"])
    },
    # bpf/flow.c
    "sizeof(struct flow_set)": abi.SET_BYTES,
    "1 << FLOWS_OF_SET_BIT": abi.FLOWS_OF_SET,
    # bpf/least-conn.c
    "SCAN_MAX": abi.SCAN_MAX,
    "NEIGHBOURS": abi.NEIGHBOURS,
    "SIZE(steer_layout, entries[0])": struct.calcsize("H"),
    "SIZE(steer_layout, turns[0])": struct.calcsize("H"),
    "SIZE(steer_layout, fallbacks[0])": struct.calcsize("H"),
    **{f"STEER_MAP_{name.upper()}": spec.number for name, spec in abi.ALL_MAPS.items()},
    **{f"STEER_CONSTANT_{name.upper()}": number for name, number in abi.CONSTANTS.items()},
    "STEER_TCP": abi.PROTOCOLS["tcp"],
    "STEER_UDP": abi.PROTOCOLS["udp"],
    "SIZE(steer_loads, load[0])": abi.LOAD_SIZE,
    # include/uapi/linux/bpf.h
    **{name: getattr(abi, name) for name in dir(abi) if name.startswith(UAPI)},
}

FROM_POLICIES = (
    ("flow.c", r"^(?:#define FLOWS_OF_SET_BIT .*?$|struct flow_set \{.*?^\};)"),
    ("least-conn.c", r"^#define (?:SCAN_MAX|NEIGHBOURS) .*?$"),
)
"""By file, the lines of a policy that Python mirrors too."""

ASKING = """
#include "steer.h"
#include "tracing.h"
%s
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
        order, codes = packed.format[0], re.findall(r"\d*[a-zA-Z]", packed.format)
        for index, field in enumerate(names.split()):
            before = struct.calcsize(order + "".join(codes[:index]))
            yield f"OFFSET({name}, {field})", before
            yield f"SIZE({name}, {field})", struct.calcsize(codes[index])


def of_policies() -> Iterator[str]:
    for name, pattern in FROM_POLICIES:
        text = (compile.sources() / name).read_text()
        found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
        assert len(found) == 2, f"{name} is written in another way"
        yield from found


def compiled(expressions: Sequence[str], directory: Path) -> list[int]:
    """What the compiler makes of constant expressions."""
    source = directory / "asking.c"
    stores = "\n\t".join(f"number = {each};" for each in expressions)
    source.write_text(ASKING % ("\n".join(of_policies()), stores))
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
