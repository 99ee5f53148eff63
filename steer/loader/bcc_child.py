"""Compiles one policy with bcc. Run as a child process by a Python that has bcc, never imported.

    python3 bcc_child.py SOURCE INCLUDE_DIR [-g] [-mllvm=OPTION] [-DNAME=VALUE]...

Writes JSON to standard output: the compiler's version, the bytecode of each program in
hexadecimal, with -g the instruction at which each line of the source begins, and the files that
were read, as a rule for make. The compiler's messages go to standard error. The exit status is 3
if this Python has no bcc. No maps are created and nothing is loaded, so no privilege is needed.

This file imports nothing of steer, as the system's Python that runs it may not have steer.
"""

import ctypes
import difflib
import json
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

PROGRAMS = (
    *("plain", "migrate", "count"),
    *("tcp", "udp", "tcp_addresses", "udp_addresses", "task_file", "holders"),
    "classic",
    *("mark", "accepted", "mark_udp", "readable", "received"),
    *("closing", "listening", "bound", "state", "trace"),
)
"""The functions that become programs, without "steer_"."""
NO_BCC = 3
CPU_S = 100
"""A policy takes less than one second; on an emulated CPU up to thirty."""
MEMORY_BYTES = 2 << 30
# As errors, these name the line. The kernel would reject the program later without the line.
WARNINGS = (
    "-Wno-unused-function",
    "-Werror=implicit-function-declaration",
    "-Werror=return-type",
    "-Werror=uninitialized",
)
Lines = dict[str, dict[int, int]]
"""By program: the index of an instruction -> the source line that begins there."""
_BEGINS = "#if defined(BPF_LICENSE)"
"""First line of bcc's preprocessed text (the preamble in BFrontendAction), after any warnings."""
_FUNCTION = "Disassembly of function steer_"
_INSTRUCTION = re.compile(r" *(\d+):\t")
_LINE = re.compile(r"; .* // Line +(\d+)")


_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main(source: str, include: str, *flags: str) -> int:
    limit_this_process()
    # Use steer's own few headers as kernel headers, so that none have to be installed.
    os.environ["BCC_KERNEL_SOURCE"] = include
    # bcc itself writes to standard output, even at exit. Keep that out of the JSON.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        import bcc
        from bcc import BPF, lib
    except ImportError as error:
        print(error, file=sys.stderr)
        return NO_BCC
    if not hasattr(BPF, "dump_func"):
        print("this bcc is not the BPF Compiler Collection", file=sys.stderr)
        return NO_BCC
    set_llvm_options([flag.removeprefix("-mllvm=") for flag in flags if flag.startswith("-mllvm=")])
    try:
        read = os.memfd_create("read")
        to_read = ["-MD", "-MF", f"/proc/self/fd/{read}"]
        places = [f"-I{include}", f"-I{os.path.dirname(source)}"]
        module, lines = compiled(BPF, source, [*to_read, *places, *flags])
    except Exception as error:  # noqa: BLE001 - bcc raises nothing more exact
        print(error, file=sys.stderr)
        return 1
    with open(f"/proc/self/fd/{read}", errors="replace") as file:
        rule = file.read()
    found = {
        "compiler": f"bcc {bcc.__version__}",
        "programs": programs_of(module, lib),
        "lines": lines,
        "read": rule,
    }
    with answer:
        json.dump(found, answer)
    return 0


def limit_this_process() -> None:
    """End this process with its parent, or when it takes too long or too much memory."""
    # If the parent ends, nobody else waits for the result.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # A policy is small. If clang does not end, the policy has a mistake.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def programs_of(module: Any, lib: Any) -> dict[str, str]:
    """The bytecode of each program in a compiled module, in hexadecimal."""
    count = lib.bpf_num_functions(module.module)
    functions = {lib.bpf_function_name(module.module, number) for number in range(count)}
    named = {name: f"steer_{name}".encode() for name in PROGRAMS}
    return {
        name: module.dump_func(function).hex()
        for name, function in named.items()
        if function in functions
    }


def compiled(compiler: Any, source: str, flags: list[str]) -> tuple[Any, Lines]:
    """The module and, if -g is among the flags, the lines of its programs."""
    cflags = [
        *WARNINGS,
        *(flag for flag in flags if flag != "-g" and not flag.startswith("-mllvm")),
    ]
    if "-g" not in flags:
        return compiler(src_file=source.encode(), cflags=cflags), {}
    with tempfile.TemporaryFile("w+", errors="replace") as told:
        try:
            with redirect_stderr(told):
                module = compiler(src_file=source.encode(), cflags=cflags, debug=0x4 | 0x8)
        except Exception:  # noqa: BLE001 - bcc raises nothing more exact
            # Compile again without debug output, so that only the messages remain.
            return compiler(src_file=source.encode(), cflags=cflags), {}
        told.seek(0)
        output = told.read()
    with open(source, errors="replace") as file:
        return module, source_lines(output, file.read().splitlines())


def set_llvm_options(options: list[str]) -> None:
    """Pass options to LLVM, as bcc does not. Impossible if bcc is linked statically with LLVM."""
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "/libLLVM" in line}
    argv = [b"bcc_child", *(option.encode() for option in options)]
    for library in libraries if options else ():
        parse = ctypes.CDLL(library).LLVMParseCommandLineOptions
        parse(len(argv), (ctypes.c_char_p * len(argv))(*argv), None)


@contextmanager
def redirect_stderr(file: IO[str]) -> Iterator[None]:
    """Redirect standard error to `file`, including what bcc's C++ code writes."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def source_lines(output: str, source: list[str]) -> Lines:
    """The source line of each instruction, from bcc's debug output.

    bcc inserts lines into the source and numbers the result. It prints that text
    (DEBUG_PREPROCESSOR) and the annotated bytecode (DEBUG_SOURCE). Here the numbers are mapped
    back to lines of the source.
    """
    text, *functions = output.split(_FUNCTION)
    begin = text.find(_BEGINS)
    if begin < 0:
        begin = text.find("\n", text.find("clang -cc1")) + 1
    matcher = difflib.SequenceMatcher(None, text[begin:].splitlines(), source, autojunk=False)
    origin = {
        block.a + i + 1: block.b + i + 1
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    }
    return {
        name: dict(line_beginnings(body, origin))
        for name, _, body in (function.partition("\n") for function in functions)
        if name in PROGRAMS
    }


def line_beginnings(body: str, origin: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Yields (index, line) for each line that begins in the annotated bytecode of a program."""
    line = None
    for row in body.splitlines():
        told, instruction = _LINE.match(row), _INSTRUCTION.match(row)
        if told:
            line = origin.get(int(told[1]))
        elif instruction and line is not None:
            yield int(instruction[1]), line
            line = None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
