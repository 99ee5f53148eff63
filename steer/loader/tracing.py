"""Programs that look at the kernel: BPF iterators, and programs on tracepoints.

They need CAP_BPF and CAP_PERFMON.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache

from steer import abi
from steer.errors import KernelError
from steer.loader.bpf_maps import Map
from steer.loader.btf import FUNCTION, TYPEDEF, KernelTypes
from steer.loader.libbpf import Descriptor, calls, refusal
from steer.loader.programs import Program
from steer.policy.bytecode import Code

_CHUNK_BYTES = 1 << 16
"""The kernel returns at most half of that at once (bpf_seq_read() of kernel/bpf/bpf_iter.c)."""


def iterator(
    name: str, over: str, code: Code, maps: Mapping[str, Map], types: KernelTypes
) -> Program:
    """A program that the kernel runs for each object of a kind.

    Args:
        name: the name that bpftool shows.
        over: the kind of object: "tcp", "udp", "task_file".

    Raises:
        VerifierError, KernelError
    """
    target = types.number(f"bpf_iter_{over}", FUNCTION)
    return Program(name, code, maps, abi.BPF_TRACE_ITER, target=target)


@cache
def tracepoint_number(on: str) -> int:
    """What programs on a tracepoint are attached to, as a number in the kernel's BTF. Finding it
    takes some 10 ms, the first time. Raises KernelError."""
    with KernelTypes() as types:
        return types.number(f"btf_trace_{on}", TYPEDEF)


@cache
def field_offset(struct: str, path: str) -> int:
    """Where a field of a kernel structure begins, in bytes. Raises KernelError."""
    with KernelTypes() as types:
        bits = types.offset_bits(struct, path)
    if bits is None:
        raise KernelError(f"find {struct}.{path} in the kernel's types", "ENOENT")
    return bits // 8


def tracepoint(
    name: str, on: str, code: Code, maps: Mapping[str, Map], types: KernelTypes
) -> Program:
    """A program that the kernel runs at a tracepoint while it is `Attached`.

    Raises:
        VerifierError, KernelError
    """
    target = types.number(f"btf_trace_{on}", TYPEDEF)
    return Program(name, code, maps, abi.BPF_TRACE_RAW_TP, target=target)


def after(
    name: str, function: str, code: Code, maps: Mapping[str, Map], types: KernelTypes
) -> Program:
    """A program that the kernel runs after each call of one of its functions while it is
    `Attached`.

    Raises:
        VerifierError, KernelError
    """
    target = types.number(function, FUNCTION)
    return Program(name, code, maps, abi.BPF_TRACE_FEXIT, target=target)


def output(program: Program, part_bytes: int = _CHUNK_BYTES) -> Iterator[bytes]:
    """Run an iterator over the objects of this thread's network namespace. Yields its output, in
    parts that hold whole records.

    Args:
        part_bytes: how much the program has to put out before it is returned. The kernel goes on
            only if more is asked for.

    Raises:
        KernelError
    """
    link = calls().bpf_link_create(program.fileno(), 0, abi.BPF_TRACE_ITER, None)
    if link < 0:
        raise refusal("attach an iterator", -link)
    with Descriptor(link):
        fd = calls().bpf_iter_create(link)
    if fd < 0:
        raise refusal("create an iterator", -fd)
    with Descriptor(fd):
        while chunk := _read(fd, part_bytes):
            yield chunk


def _read(fd: int, most_bytes: int) -> bytes:
    while True:
        try:
            return os.read(fd, most_bytes)
        except BlockingIOError:  # it went over many objects, and none had anything to say
            continue


class Attached(Descriptor):
    """A program on its tracepoint or function, until this is closed. Raises KernelError."""

    def __init__(self, program: Program) -> None:
        fd = calls().bpf_raw_tracepoint_open(None, program.fileno())
        if fd < 0:
            raise refusal("attach a tracing program", -fd)
        super().__init__(fd)
