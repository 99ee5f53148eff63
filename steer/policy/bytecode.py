"""Policy objects: compiled bytecode before it is linked with maps. Pure.

An object is stored as JSON with one instruction per line, so that a diff of a prebuilt object is
readable.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import msgspec

from steer import abi

INSN_BYTES = 8
_INSN = struct.Struct("=BBhi")
_CLASS, _JUMPS = 7, (5, 6)
_GOTO, _CALL, _EXIT = 0x05, 0x85, 0x95
_MOVE = 0xB7
"""Opcodes, see Documentation/bpf/standardization/instruction-set.rst; `_MOVE` has an immediate."""


class Code(msgspec.Struct, frozen=True):
    """One program: its instructions in hexadecimal, and the places to link.

    Args:
        relocations: names of maps by index of the instruction that loads them.
        constants: names in `abi.CONSTANTS` by index of the instruction that loads them.
    """

    instructions: list[str]
    relocations: dict[int, str]
    constants: dict[int, str] = {}

    def linked(self, descriptors: Mapping[str, int], constants: Mapping[str, int]) -> bytes:
        """The instructions with file descriptors of maps and values of constants filled in."""
        insns = bytearray.fromhex("".join(self.instructions))
        values = {index: descriptors[name] for index, name in self.relocations.items()}
        values |= {index: constants[name] for index, name in self.constants.items()}
        for index, value in values.items():
            at = index * INSN_BYTES
            code, registers, offset, _ = _INSN.unpack_from(insns, at)
            _INSN.pack_into(insns, at, code, registers, offset, value)
        return bytes(insns)


class Inputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """The files that an object depends on, other than its source and steer's headers.

    Args:
        digests: digests of the content of files, by path.
        absent: paths that would be read instead if they existed.
    """

    digests: dict[str, str] = {}
    absent: tuple[str, ...] = ()


NO_INPUTS = Inputs()


class PolicyObject(msgspec.Struct, frozen=True, omit_defaults=True):
    """A compiled policy.

    Args:
        digest: a digest of the sources that it was compiled from; see `loader.compile.digest`.
        compiler: the compiler's name and version, such as "bcc 0.26.0".
        programs: "plain", and "migrate" for kernels with migration.
        lines: for a custom policy, by program: index of an instruction -> the source line that
            begins there.
        inputs: the files it depends on; None if unknown.
    """

    digest: str
    compiler: str
    programs: dict[str, Code]
    lines: dict[str, dict[int, int]] = {}
    inputs: Inputs | None = NO_INPUTS

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @staticmethod
    def decode(data: bytes) -> PolicyObject:
        """Raises msgspec.DecodeError: `data` is not an object."""
        return msgspec.json.decode(data, type=PolicyObject)


def inline_exits(raw: bytes) -> tuple[bytes, list[int]]:
    """Replace each jump to the end of the program by a copy of that end.

    LLVM gives a program a single end, far from the code that runs for each packet. Jumping there
    needs another cache line. The kernel also restores registers at the first `exit` only.

    Returns:
        The new program, and the new index of each instruction.
    """
    insns = list(_INSN.iter_unpack(raw))
    jumps = {
        at: at + 1 + offset
        for at, (code, _, offset, _) in enumerate(insns)
        if code & _CLASS in _JUMPS and code not in (_CALL, _EXIT)
    }
    ends = {
        at: insns[to : to + 2]
        for at, to in jumps.items()
        if insns[at][0] == _GOTO and _is_end(insns[to : to + 2])
    }
    left = {to for at, to in jumps.items() if at not in ends}
    for at, to in jumps.items():  # the verifier rejects unreachable code
        if at in ends and to not in left and insns[to - 1][0] in (_GOTO, _EXIT):
            del ends[at]
            left.add(to)
    now = [at + sum(end < at for end in ends) for at in range(len(insns))]
    written = bytearray()
    for at, (code, registers, offset, value) in enumerate(insns):
        if at in jumps:
            offset = now[jumps[at]] - now[at] - 1
        for insn in ends.get(at, [(code, registers, offset, value)]):
            written += _INSN.pack(*insn)
    return bytes(written), now


def _is_end(insns: Sequence[tuple[int, ...]]) -> bool:
    return [code for code, *_ in insns] == [_MOVE, _EXIT]


def extract_links(raw: bytes) -> Code:
    """Replace the placeholders of maps and constants in compiled bytecode by zeros.

    Raises:
        ValueError: the bytecode uses a map that steer.h does not have.
    """
    names = {spec.number: name for name, spec in abi.ALL_MAPS.items()}
    numbers = {number: name for name, number in abi.CONSTANTS.items()}
    instructions, relocations, constants = [], {}, {}
    for index, (code, registers, offset, value) in enumerate(_INSN.iter_unpack(raw)):
        source = registers >> 4
        if code == abi.BPF_LD_IMM64 and source in (abi.BPF_PSEUDO_MAP_FD, abi.BPF_PSEUDO_MAP_VALUE):
            if value not in names:
                raise ValueError(f"instruction {index} uses a map that steer.h does not have")
            relocations[index] = names[value]
            value = 0
        elif code == abi.BPF_LD_IMM64 and value in numbers:
            constants[index] = numbers[value]
            value = 0
        instructions.append(_INSN.pack(code, registers, offset, value).hex())
    return Code(instructions, relocations, constants)
