"""BPF programs: loading them, and attaching them to a cgroup."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping

from steer import abi
from steer.errors import VerifierError
from steer.linux import capabilities
from steer.loader.bpf_maps import Map
from steer.loader.libbpf import Descriptor, calls, refusal
from steer.policy.bytecode import Code

ATTACH_TYPES = {
    "plain": abi.BPF_SK_REUSEPORT_SELECT,
    "migrate": abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE,
    "count": abi.BPF_CGROUP_SOCK_OPS,
    "closing": abi.BPF_CGROUP_INET_SOCK_RELEASE,
    "listening": abi.BPF_CGROUP_SOCK_OPS,
}
"""The attach type of a program, by its name in the object."""


LOG_BYTES = 1 << 20
NEEDS_PERFMON = "give CAP_PERFMON too: without it the verifier is far stricter"


class _LoadOptions(ctypes.Structure):
    """Mirrors struct bpf_prog_load_opts of libbpf 1.0."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog", ctypes.c_uint32 * 4),
        ("attach", ctypes.c_uint32 * 3),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt_and_size", ctypes.c_uint32 * 2),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt_and_size", ctypes.c_uint32 * 2),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_void_p),
    )


class Program(Descriptor):
    """A loaded program.

    Args:
        name: bpftool shows its first 15 characters.
        code: the bytecode.
        maps: the maps that it uses, by name.
        attach_type: a key of `_KINDS`.
        protocol: protocol of the sockets in its group.
        target: for a tracing program, the number in the kernel's BTF of what it attaches to.

    Raises:
        VerifierError: the verifier rejects it; has the log.
        KernelError: not permitted, or the kernel does not support it.
    """

    def __init__(
        self,
        name: str,
        code: Code,
        maps: Mapping[str, Map],
        attach_type: int,
        protocol: str = "tcp",
        target: int = 0,
    ) -> None:
        descriptors = {key: value.fileno() for key, value in maps.items()}
        insns = code.linked(descriptors, {"protocol": abi.PROTOCOLS[protocol]})
        self._kind = _KINDS[attach_type]
        options = _LoadOptions(sz=ctypes.sizeof(_LoadOptions), expected_attach_type=attach_type)
        options.attach[0] = target
        fd = first = self._load(name, insns, options)
        act = f"load program {name}"
        if fd < 0 and fd not in (-errno.EPERM, -errno.ENOSYS):
            log = ctypes.create_string_buffer(LOG_BYTES)
            options.log_level = 1
            options.log_size = LOG_BYTES
            options.log_buf = ctypes.addressof(log)
            fd = self._load(name, insns, options)
            if fd < 0 and log.value:
                told = log.value.decode(errors="replace")
                # The second time it is ENOSPC if the log is longer than the buffer.
                reason = OSError(-first, os.strerror(-first))
                cure = "" if capabilities.may_perfmon() else NEEDS_PERFMON
                error = VerifierError.from_oserror(act, reason, cure=cure, detail=shorten(told))
                error.log = told
                raise error
        if fd < 0:
            raise refusal(act, -fd)
        super().__init__(fd)

    def missed_runs(self) -> int:
        """How often a tracing program was not run, as it ran already on the same CPU; from
        proc_pid_fdinfo(5), Linux 5.12."""
        with open(f"/proc/self/fdinfo/{self._fd}") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields.get("recursion_misses", 0))

    def _load(self, name: str, insns: bytes, options: _LoadOptions) -> int:
        fd: int = calls().bpf_prog_load(
            self._kind,
            name.replace("-", "_").encode()[:15],
            b"GPL",
            insns,
            len(insns) // 8,
            ctypes.byref(options),
        )
        return fd


_KINDS = {
    abi.BPF_SK_REUSEPORT_SELECT: abi.BPF_PROG_TYPE_SK_REUSEPORT,
    abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE: abi.BPF_PROG_TYPE_SK_REUSEPORT,
    abi.BPF_CGROUP_SOCK_OPS: abi.BPF_PROG_TYPE_SOCK_OPS,
    abi.BPF_TRACE_ITER: abi.BPF_PROG_TYPE_TRACING,
    abi.BPF_TRACE_RAW_TP: abi.BPF_PROG_TYPE_TRACING,
    abi.BPF_TRACE_FEXIT: abi.BPF_PROG_TYPE_TRACING,
    abi.BPF_CGROUP_INET_SOCK_RELEASE: abi.BPF_PROG_TYPE_CGROUP_SOCK,
    abi.BPF_CGROUP_INET4_POST_BIND: abi.BPF_PROG_TYPE_CGROUP_SOCK,
    abi.BPF_CGROUP_INET6_POST_BIND: abi.BPF_PROG_TYPE_CGROUP_SOCK,
}
"""The program type of each attach type."""


class Link(Descriptor):
    """Attaches a program to a cgroup and all below it until closed. Linux 5.7+.

    Args:
        directory: a descriptor of the cgroup's directory.
        attach_type: the program's.

    Raises:
        KernelError
    """

    def __init__(
        self, program: Descriptor, directory: int, attach_type: int = abi.BPF_CGROUP_SOCK_OPS
    ) -> None:
        fd = calls().bpf_link_create(program.fileno(), directory, attach_type, None)
        if fd < 0:
            raise refusal("attach to the cgroup", -fd)
        super().__init__(fd)


def shorten(log: str, lines: int = 12) -> str:
    """The last lines of a verifier log, which say why it rejected the program."""
    kept = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
    return "\n".join(kept[-lines:])
