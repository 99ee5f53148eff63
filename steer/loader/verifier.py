"""What the verifier says of a program: its figures, and at which line of C it refuses.

`python -m steer.loader.verifier FILE` puts the figures of the built-in policies on this
kernel into FILE, beside those of others.
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
    "dereference of modified ctx ptr": "the compiler chose between two fields of ctx and then "
    "read; read each into a variable first, and steer_barrier(variable)",
    "invalid access to packet": "compare with ctx->data_end before you read",
    "_or_null'": "compare with NULL before you read",
    "too large": "loops cost as often as they may run: let them run less often",
    "infinite loop": "give the loop a limit that does not depend on what was read",
    "back-edge": "this kernel takes no loops: put #pragma unroll before it",
    "unknown func": "this kernel has no such helper",
}
"""By what the verifier says; Documentation/bpf/verifier.rst has more."""
_INSTRUCTION = re.compile(r"^(\d+): \(|\binsn (\d+)", re.MULTILINE)


class Figures(msgspec.Struct, frozen=True):
    """What a program asks of the verifier, which gives up at a million instructions.

    Args:
        instructions: of the program.
        processed: instructions that it went through, on all paths.
        states_peak: states that it held at once.
        stack_bytes: at most 512.
    """

    instructions: int
    processed: int
    states_peak: int
    states_total: int
    stack_bytes: int
    time_us: int


class _Verified(Program):
    """A program that keeps what the verifier told when it took it."""

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
    """The maps that these programs speak of, by name, closed with `stack`.

    Raises:
        KernelError: not permitted.
    """
    names = {name for code in codes for name in code.relocations.values()}
    return {name: stack.enter_context(bpf_maps.Map(name, _SLOTS)) for name in sorted(names)}


def why_not(kind: str) -> str:
    """Why this kernel takes no such programs, or nothing."""
    found = probe.ask(features.MIGRATE) if kind == "migrate" else None
    return str(found.note) if found and found.answer is Answer.NO else ""


def figures(kind: str, code: Code, maps: Mapping[str, bpf_maps.Map]) -> Figures:
    """Load a program to see what it asks of the verifier.

    Args:
        kind: key of bpf.ATTACH_TYPES.

    Raises:
        VerifierError: refused.
        KernelError: not permitted, or not known to this kernel.
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


def point(detail: str, lines: Mapping[int, int], source: Path, shown: str = "") -> str:
    """What a verifier said, and below it the line of C that it speaks of, if one is known.

    Where it is in what steer.h does for the policy, that is the last line of the policy's
    own before it. Then what would help, where that is known.

    Args:
        detail: the last lines of its log.
        lines: of the program; see `PolicyObject.lines`.
        shown: what to show of the log; if not given, these last lines.
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
    """Of every program of every built-in policy, by "policy/program", that this kernel may take.

    Raises:
        CompileError, KernelError
    """
    found = {}
    for source in sorted(compiler.sources().glob("*.c")):
        programs = compiler.load(source).programs
        with ExitStack() as stack:
            maps = maps_of(programs.values(), stack)
            for kind, code in programs.items():
                if why_not(kind):
                    continue
                found[f"{source.stem}/{kind}"] = figures(kind, code, maps)
    return found


def series() -> str:
    """This kernel's: "6.18"."""
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
