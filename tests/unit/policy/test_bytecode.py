"""Policy objects: extracting links to maps, linking again, and the stored form."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer import abi
from steer.policy.bytecode import INSN_BYTES, Code, PolicyObject, extract_links, inline_exits
from testkit import ROOT
from testkit.bpf_objects import OTHER_PROGRAMS

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)

PREBUILT = sorted((ROOT / "bpf/prebuilt").glob("*.json"))
DESCRIPTORS = {name: 100 + rank for rank, name in enumerate(abi.ALL_MAPS)}
KNOWN_TO = {"inspect": abi.TRACING_MAPS, "attach": abi.ATTACH_MAPS}
OF_EACH: dict[str, set[str]] = {
    "open": {"slots", "owners", "moved"},
    "inspect": set(),
    "attach": set(),
}
"""Maps that every program of an object speaks of, where it is no policy's."""
NUMBERS = {name: 200 + rank for rank, name in enumerate(abi.CONSTANTS)}
EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)


def load_map(name: str, kind: int = abi.BPF_PSEUDO_MAP_FD, register: int = 1) -> bytes:
    """ld_imm64 of a placeholder. Its second half would hold an offset."""
    first = struct.pack("=BBhi", abi.BPF_LD_IMM64, kind << 4 | register, 0, abi.MAPS[name].number)
    return first + struct.pack("=BBhi", 0, 0, 0, 16 if kind == abi.BPF_PSEUDO_MAP_VALUE else 0)


def immediates(raw: bytes) -> list[int]:
    return [value for *_, value in struct.iter_unpack("=BBhi", raw)]


def test_placeholders_are_found_in_both_kinds_of_map_loads() -> None:
    raw = load_map("sockets") + load_map("table", abi.BPF_PSEUDO_MAP_VALUE, 7) + EXIT
    code = extract_links(raw)
    assert code.relocations == {0: "sockets", 2: "table"}
    assert immediates(bytes.fromhex("".join(code.instructions))) == [0, 0, 0, 16, 0]


def test_linking_changes_nothing_but_the_descriptors() -> None:
    raw = load_map("sockets") + load_map("table", abi.BPF_PSEUDO_MAP_VALUE, 7) + EXIT
    linked = extract_links(raw).linked(DESCRIPTORS, NUMBERS)
    assert immediates(linked) == [DESCRIPTORS["sockets"], 0, DESCRIPTORS["table"], 16, 0]
    stand_ins = {name: spec.number for name, spec in abi.MAPS.items()}
    assert extract_links(raw).linked(stand_ins, abi.CONSTANTS) == raw


def insns(*each: tuple[int, int, int]) -> bytes:
    """Of opcode, offset and number."""
    return b"".join(struct.pack("=BBhi", code, 0, offset, value) for code, offset, value in each)


ADD, MOVE, EQUALS, GOTO, CALL = 0x07, 0xB7, 0x15, 0x05, 0x85
PASS, END = (MOVE, 0, 1), (0x95, 0, 0)


def test_a_jump_to_the_end_becomes_an_exit() -> None:
    raw = insns((EQUALS, 2, 0), (ADD, 0, 7), (GOTO, 1, 0), (ADD, 0, 8), PASS, END)
    ended = insns((EQUALS, 3, 0), (ADD, 0, 7), PASS, END, (ADD, 0, 8), PASS, END)
    assert inline_exits(raw) == (ended, [0, 1, 2, 4, 5, 6])


def test_jumps_backwards_and_calls_keep_their_targets() -> None:
    raw = insns((GOTO, 1, 0), (GOTO, 2, 0), (CALL, 9, 9), (EQUALS, -3, 0), PASS, END)
    ended = insns((GOTO, 2, 0), PASS, END, (CALL, 9, 9), (EQUALS, -4, 0), PASS, END)
    assert inline_exits(raw)[0] == ended


def test_an_end_after_another_stays_reachable() -> None:
    raw = insns((EQUALS, 1, 0), (GOTO, 3, 0), (GOTO, 2, 0), (ADD, 0, 1), END, PASS, END)
    ended = insns((EQUALS, 1, 0), (GOTO, 4, 0), PASS, END, (ADD, 0, 1), END, PASS, END)
    assert inline_exits(raw)[0] == ended


def load_number(name: str) -> bytes:
    """ld_imm64 of a placeholder for a constant."""
    return struct.pack("=BBhi", abi.BPF_LD_IMM64, 3, 0, abi.CONSTANTS[name]) + bytes(8)


def test_a_constant_is_linked() -> None:
    raw = EXIT + load_number("protocol") + load_map("table")
    code = extract_links(raw)
    assert (code.constants, code.relocations) == ({1: "protocol"}, {3: "table"})
    assert immediates(bytes.fromhex("".join(code.instructions))) == [0, 0, 0, 0, 0]
    assert immediates(code.linked({"table": 7}, {"protocol": 17})) == [0, 17, 0, 7, 0]


def test_a_plain_64_bit_number_is_no_map() -> None:
    number = struct.pack("=BBhi", abi.BPF_LD_IMM64, 1, 0, abi.MAPS["cpus"].number) + bytes(8)
    code = extract_links(number + EXIT)
    assert code.relocations == {}
    assert code.linked({}, {}) == number + EXIT


@pytest.mark.parametrize("kind", [abi.BPF_PSEUDO_MAP_FD, abi.BPF_PSEUDO_MAP_VALUE])
@pytest.mark.parametrize("number", [0, 3, -1, 0x57EE0000, 0x57EE0000 | len(abi.MAPS) + 1])
def test_an_unknown_map_is_refused(kind: int, number: int) -> None:
    raw = EXIT + struct.pack("=BBhi", abi.BPF_LD_IMM64, kind << 4, 0, number) + bytes(8)
    with pytest.raises(ValueError, match=r"^instruction 1 uses a map that steer\.h does not have$"):
        extract_links(raw)


def test_half_an_instruction_is_refused() -> None:
    with pytest.raises(struct.error):
        extract_links(EXIT + b"\x95")


def test_placeholders_differ() -> None:
    numbers = [spec.number for spec in abi.MAPS.values()]
    assert len(set(numbers)) == len(numbers)
    assert all(0 < number < 2**31 for number in numbers), "an immediate is signed"


def some_object() -> PolicyObject:
    plain = extract_links(load_map("sockets") + EXIT)
    return PolicyObject("0" * 64, "bcc 0.26.0, clang 14", {"plain": plain, "migrate": plain})


def test_an_object_reads_back() -> None:
    assert PolicyObject.decode(some_object().encode()) == some_object()


def test_source_lines_read_back_and_are_left_out_if_empty() -> None:
    lines = {"plain": {0: 12, 3: 14}, "migrate": {}}
    mine = msgspec.structs.replace(some_object(), lines=lines)
    assert PolicyObject.decode(mine.encode()) == mine
    assert "lines" not in json.loads(some_object().encode())


def test_an_object_is_stored_one_instruction_a_line() -> None:
    lines = some_object().encode().decode().split("\n")
    assert lines[-1] == "", "ends with a newline"
    for instruction in some_object().programs["plain"].instructions:
        assert [line.strip(' ,"') for line in lines].count(instruction) == 2
    assert json.loads(some_object().encode())["programs"]["plain"]["relocations"] == {
        "0": "sockets"
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"digest": "", "compiler": "", "programs": {"plain": {}}}',
        b'{"digest": "", "compiler": "", "programs": {"plain": {"instructions": [1], '
        b'"relocations": {}}}}',
        b'{"digest": "", "compiler": "", "programs": {"plain": {"instructions": [], '
        b'"relocations": {"x": "table"}}}}',
        some_object().encode()[:-20],
    ],
)
def test_data_that_is_not_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        PolicyObject.decode(data)


instructions = st.tuples(
    st.integers(0, 255).filter(lambda code: code != abi.BPF_LD_IMM64),
    st.integers(0, 255),
    st.integers(-(2**15), 2**15 - 1),
    st.integers(-(2**31), 2**31 - 1),
).map(lambda fields: struct.pack("=BBhi", *fields))


@quick
@given(
    st.lists(
        instructions
        | st.sampled_from(list(abi.MAPS)).map(load_map)
        | st.sampled_from(list(abi.CONSTANTS)).map(load_number)
    )
)
def test_any_bytecode_comes_back(parts: list[bytes]) -> None:
    raw = b"".join(parts)
    code = extract_links(raw)
    assert len(code.instructions) * INSN_BYTES == len(raw)
    stored = msgspec.json.decode(msgspec.json.encode(code), type=Code)
    stand_ins = {name: spec.number for name, spec in abi.MAPS.items()}
    assert stored.linked(stand_ins, abi.CONSTANTS) == raw


@pytest.mark.parametrize("path", PREBUILT, ids=lambda path: path.stem)
def test_prebuilt_objects_are_as_encode_writes_them(path: Path) -> None:
    data = path.read_bytes()
    found = PolicyObject.decode(data)
    assert found.encode() == data
    assert set(found.programs) == OTHER_PROGRAMS.get(path.stem, {"plain", "migrate"})
    of_each = OF_EACH.get(path.stem, {"sockets", "table", "counts"})
    known = KNOWN_TO.get(path.stem, abi.MAPS)
    for code in found.programs.values():
        assert of_each <= set(code.relocations.values()) <= set(known)
        linked = code.linked(DESCRIPTORS, NUMBERS)
        assert len(linked) == len(code.instructions) * INSN_BYTES
        numbers = immediates(linked)
        for index, name in code.relocations.items():
            assert linked[index * INSN_BYTES] == abi.BPF_LD_IMM64
            assert numbers[index] == DESCRIPTORS[name]
