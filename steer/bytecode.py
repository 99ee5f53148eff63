"""Policy objects: bytecode as compiled, before any map exists.

Pure: what the compiler's output means, how it is stored, how maps are linked in.
An object is stored as JSON with one instruction to a line, so that a change of a
prebuilt one can be read in a diff.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import msgspec

from steer import abi

INSN_BYTES = 8
_INSN = struct.Struct("=BBhi")


class Code(msgspec.Struct, frozen=True):
    """One program: its instructions in hexadecimal and, by index, what they load.

    Args:
        relocations: maps.
        constants: numbers, as `abi.CONSTANTS` names them.
    """

    instructions: list[str]
    relocations: dict[int, str]
    constants: dict[int, str] = {}

    def linked(self, descriptors: Mapping[str, int], constants: Mapping[str, int]) -> bytes:
        """The instructions with file descriptors in place of map names, and the constants."""
        insns = bytearray.fromhex("".join(self.instructions))
        values = {index: descriptors[name] for index, name in self.relocations.items()}
        values |= {index: constants[name] for index, name in self.constants.items()}
        for index, value in values.items():
            at = index * INSN_BYTES
            code, registers, offset, _ = _INSN.unpack_from(insns, at)
            _INSN.pack_into(insns, at, code, registers, offset, value)
        return bytes(insns)


class Inputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """The files that decided about an object, beside its source and our own headers.

    Args:
        digests: of what was read, by path.
        absent: paths that are searched earlier, where nothing was.
    """

    digests: dict[str, str] = {}
    absent: tuple[str, ...] = ()


NO_INPUTS = Inputs()


class PolicyObject(msgspec.Struct, frozen=True, omit_defaults=True):
    """A compiled policy.

    Args:
        digest: of the sources it was compiled from; see `kernel.compile.digest`.
        compiler: what compiled it, "bcc 0.26.0, clang 14".
        programs: "plain", and "migrate" for kernels that let a program migrate.
        lines: by program, for a policy of one's own: index of an instruction -> the line
            of the source that begins there.
        inputs: what was read to compile it; None where that cannot be told.
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
        """Raises msgspec.DecodeError where `data` is not an object's."""
        return msgspec.json.decode(data, type=PolicyObject)


def unlink(raw: bytes) -> Code:
    """Find the stand-ins for maps and constants in compiled bytecode and take them out.

    Raises:
        ValueError: a map that steer.h does not know.
    """
    names = {spec.number: name for name, spec in abi.MAPS.items()}
    numbers = {number: name for name, number in abi.CONSTANTS.items()}
    instructions, relocations, constants = [], {}, {}
    for index, (code, registers, offset, value) in enumerate(_INSN.iter_unpack(raw)):
        source = registers >> 4
        if code == abi.BPF_LD_IMM64 and source in (abi.BPF_PSEUDO_MAP_FD, abi.BPF_PSEUDO_MAP_VALUE):
            if value not in names:
                raise ValueError(f"instruction {index} speaks of a map that steer.h does not have")
            relocations[index] = names[value]
            value = 0
        elif code == abi.BPF_LD_IMM64 and value in numbers:
            constants[index] = numbers[value]
            value = 0
        instructions.append(_INSN.pack(code, registers, offset, value).hex())
    return Code(instructions, relocations, constants)
