"""The verifier's figures of a program, and the line of C at which it rejects one.

`python -m steer.loader.verifier FILE` writes the figures of the built-in policies on this kernel
into FILE and keeps those of other kernels there.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec

from steer import features
from steer.errors import SteerError
from steer.features import Answer
from steer.loader import bpf_maps, probe
from steer.loader import compile as compiler
from steer.loader.programs import ATTACH_TYPES, LOG_BYTES, Program, _LoadOptions
from steer.policy.bytecode import Code

_LOG_STATS = 4
"""BPF_LOG_STATS, include/linux/bpf_verifier.h; Linux 5.2+."""
_SLOTS = 64
_CURES = {
    "dereference of modified ctx ptr": "the compiler has merged two reads of ctx into one; "
    "read each into a variable first, and call steer_barrier(variable)",
    "invalid access to packet": "compare with ctx->data_end before you read",
    "_or_null'": "compare with NULL before you read",
    "too large": "the verifier follows every round of a loop: reduce the number of rounds",
    "infinite loop": "give the loop a limit that does not depend on data",
    "back-edge": "this kernel accepts no loops: put #pragma unroll before the loop",
    "unknown func": "this kernel has no such helper",
}
"""Cures by part of the verifier's message; see Documentation/bpf/verifier.rst."""
_INSTRUCTION = re.compile(r"^(\d+): \(|\binsn (\d+)", re.MULTILINE)


class Figures(msgspec.Struct, frozen=True):
    """The verifier's effort for a program. It rejects a program after a million instructions.

    Args:
        instructions: length of the program.
        processed: instructions that the verifier followed, on all paths.
        states_peak: largest number of states that it held at the same time.
        stack_bytes: stack of the program; the limit is 512.
    """

    instructions: int
    processed: int
    states_peak: int
    states_total: int
    stack_bytes: int
    time_us: int


class _Verified(Program):
    """A program that keeps the verifier's log of a successful load."""

    told = ""

    def _load(self, name: str, insns: bytes, options: _LoadOptions) -> int:
        if options.log_level:
            return super()._load(name, insns, options)
        log = ctypes.create_string_buffer(LOG_BYTES)
        options.log_level = _LOG_STATS
        options.log_size = LOG_BYTES
        options.log_buf = ctypes.addressof(log)
        fd = super()._load(name, insns, options)
        self.told = log.value.decode(errors="replace")
        return fd


def maps_of(codes: Iterable[Code], stack: ExitStack) -> dict[str, bpf_maps.Map]:
    """Create the maps that these programs use, by name. `stack` closes them.

    Raises:
        KernelError: not permitted.
    """
    names = {name for code in codes for name in code.relocations.values()}
    return {name: stack.enter_context(bpf_maps.Map(name, _SLOTS)) for name in sorted(names)}


def why_not(kind: str) -> str:
    """Why this kernel does not support this kind of program, or ""."""
    found = probe.ask(features.MIGRATE) if kind == "migrate" else None
    return str(found.note) if found and found.answer is Answer.NO else ""


def figures(kind: str, code: Code, maps: Mapping[str, bpf_maps.Map]) -> Figures:
    """Load a program to get the verifier's figures.

    Args:
        kind: a key of `programs.ATTACH_TYPES`.

    Raises:
        VerifierError: the verifier rejects it.
        KernelError: not permitted, or the kernel does not support it.
    """
    with _Verified(f"steer_{kind}", code, maps, ATTACH_TYPES[kind]) as program:
        told = program.told
    return Figures(
        len(code.instructions),
        _number(r"processed (\d+) insns", told),
        _number(r"peak_states (\d+)", told),
        _number(r"total_states (\d+)", told),
        _number(r"stack depth (\d+)", told),
        _number(r"verification time (\d+) usec", told),
    )


def _number(pattern: str, told: str) -> int:
    found = re.search(pattern, told)
    return int(found[1]) if found else 0


def explain(detail: str, lines: Mapping[int, int], source: Path, shown: str = "") -> str:
    """The verifier's message, and if known the line of C that it is about and a cure.

    If the instruction belongs to steer.h, the line is the policy's last one before it.

    Args:
        detail: the last lines of the log.
        lines: lines of the program; see `PolicyObject.lines`.
        shown: the part of the log to show; the default is `detail`.
    """
    parts = [shown.rstrip() or detail, _line(detail, lines, source)]
    parts += [cure for words, cure in _CURES.items() if words in detail][:1]
    return "\n".join(part for part in parts if part)


def _line(detail: str, lines: Mapping[int, int], source: Path) -> str:
    named = [int(first or second) for first, second in _INSTRUCTION.findall(detail)]
    begins = sorted(lines)
    at = bisect_right(begins, named[-1]) if named else 0
    if not at:
        return ""
    number = lines[begins[at - 1]]
    try:
        words = compiler.text(source).splitlines()[number - 1].strip()
    except (SteerError, IndexError):
        words = ""
    return f"{source}:{number}: {words}"


# ---- the built-in policies


def built_in() -> dict[str, Figures]:
    """The figures of all built-in programs that this kernel supports, by "policy/program".
    Without programs that look at the kernel, as these depend on the kernel's types.

    Raises:
        CompileError, KernelError
    """
    found = {}
    for source in sorted(compiler.sources().glob("*.c")):
        programs = compiler.load(source).programs
        with ExitStack() as stack:
            maps = maps_of(programs.values(), stack)
            for kind, code in programs.items():
                if kind not in ATTACH_TYPES or why_not(kind):
                    continue
                found[f"{source.stem}/{kind}"] = figures(kind, code, maps)
    return found


def series() -> str:
    """The series of this kernel, such as "6.18"."""
    return ".".join(os.uname().release.split(".")[:2])


def main(arguments: list[str]) -> int:
    try:
        [name] = arguments
    except ValueError:
        print("usage: python -m steer.loader.verifier FILE", file=sys.stderr)
        return 2
    file = Path(name)
    known = msgspec.json.decode(file.read_bytes()) if file.exists() else {}
    try:
        known[series()] = msgspec.to_builtins(built_in())
    except SteerError as error:
        print(f"{error}\n{error.detail}", file=sys.stderr)
        return 1
    for each in known[series()].values():
        del each["time_us"]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(known, order="sorted"), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
