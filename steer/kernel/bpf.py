"""The one door to libbpf: maps, programs and the table that programs read.

A `Map` or `Program` is a file descriptor that is closed with it. Nothing is
pinned: what the kernel still needs is held by the sockets it steers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from functools import cache
from types import TracebackType
from typing import Self

from steer import abi
from steer.bytecode import Code
from steer.errors import KernelError, VerifierError
from steer.kernel import filtered

ATTACH_TYPES = {
    "plain": abi.BPF_SK_REUSEPORT_SELECT,
    "migrate": abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE,
    "count": abi.BPF_CGROUP_SOCK_OPS,
}
"""By the name of the program in its object."""
LOG_BYTES = 1 << 20
_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}
_MEMBARRIER_CMD_GLOBAL = 1
_STORES_IN_ORDER = ("x86_64", "i686")


class _MapOptions(ctypes.Structure):
    """Mirrors struct bpf_map_create_opts of libbpf 1.0; `sz` tells later ones."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf", ctypes.c_uint32 * 4),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
    )


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


def calls() -> ctypes.CDLL:
    """The library, to make system calls with.

    Raises:
        KernelError: it is not installed, or a filter would end us.
    """
    if filtered.is_deadly(filtered.BPF):
        cure = "let the seccomp filter pass it (systemd: SystemCallFilter=bpf)"
        raise KernelError("call bpf(2)", "EPERM", cure)
    return libbpf()


@cache
def libbpf() -> ctypes.CDLL:
    """The library.

    Raises:
        KernelError: it is not installed.
    """
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise KernelError(
            "load libbpf.so.1", str(error), "install libbpf 1.0 or later (Debian: libbpf1)"
        ) from None
    lib.libbpf_set_print(None)
    # Named here once: without the types ctypes would pass 64-bit values as int.
    lib.bpf_map_create.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_void_p,
    )
    lib.bpf_prog_load.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    )
    lib.bpf_btf_load.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p)
    lib.bpf_link_create.argtypes = (
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
    )
    lib.bpf_map_update_elem.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_uint64,
    )
    lib.bpf_map_lookup_elem.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    lib.bpf_map_delete_elem.argtypes = (ctypes.c_int, ctypes.c_char_p)
    lib.bpf_map_get_next_key.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    return lib


def refusal(act: str, code: int) -> KernelError:
    """The error for errno `code` of bpf(2), with the cure where one is known."""
    cures = {
        errno.EPERM: "needs CAP_BPF: run as root, or see `steer doctor`",
        errno.ENOSYS: "this kernel has no bpf(2)",
        errno.ENOMEM: "raise RLIMIT_MEMLOCK, or the memory limit of the cgroup",
    }
    return KernelError(act, errno.errorcode.get(code, str(code)), cures.get(code, ""))


class Descriptor:
    """A file descriptor of bpf(2), closed once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def become(self, fd: int) -> None:
        """Stand for another object of the same kind; the descriptor is ours."""
        self.close()
        self._fd = fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Map(Descriptor):
    """A map of the kind that `abi.MAPS` names.

    Args:
        name: key of `abi.MAPS`; bpftool shows it as steer_NAME.
        entries: capacity, for maps that have none of their own.

    Raises:
        KernelError: the kernel refuses, or libbpf is missing.
    """

    def __init__(self, name: str, entries: int = 1) -> None:
        self.spec = abi.MAPS[name]
        self.entries = entries if self.spec.entries is None else self.spec.entries
        act = f"create BPF map steer_{name}"
        options = _MapOptions(sz=ctypes.sizeof(_MapOptions), map_flags=self.spec.flags)
        with ExitStack() as stack:
            if self.spec.kind == abi.BPF_MAP_TYPE_SK_STORAGE:
                btf = stack.enter_context(_Btf(act))
                options.btf[:3] = (btf.fileno(), btf.KEY, btf.VALUE)
            fd = calls().bpf_map_create(
                self.spec.kind,
                f"steer_{name}".encode(),
                self.spec.key_bytes,
                self.spec.value_bytes,
                self.entries,
                ctypes.byref(options),
            )
        if fd < 0:
            raise refusal(act, -fd)
        super().__init__(fd)

    @classmethod
    def received(cls, name: str, fd: int) -> Self:
        """One that somebody else made; the descriptor is ours."""
        self = cls.__new__(cls)
        self.spec = abi.MAPS[name]
        self._fd = fd
        return self

    def put(self, key: int, value: bytes) -> None:
        """Set one entry. Raises KernelError."""
        status = calls().bpf_map_update_elem(self._fd, self._key(key), value, 0)
        if status < 0:
            raise refusal(f"put entry {key}", -status)

    def put_socket(self, slot: int, fd: int) -> None:
        """Make the socket `fd` the one of `slot`; it has to be bound, and over TCP to listen."""
        self.put(slot, fd.to_bytes(8, sys.byteorder))

    def delete(self, key: int) -> None:
        """Empty one entry; one that is empty already is left so."""
        status = calls().bpf_map_delete_elem(self._fd, self._key(key))
        if status < 0 and status != -errno.ENOENT:
            raise refusal(f"delete entry {key}", -status)

    def has(self, key: int) -> bool:
        """Whether there is such an entry; of sockets, whether it is one that is still in a group.

        Raises:
            KernelError
        """
        value = ctypes.create_string_buffer(self.spec.value_bytes)
        status = calls().bpf_map_lookup_elem(self._fd, self._key(key), value)
        if status < 0 and status != -errno.ENOENT:
            raise refusal(f"look for entry {key}", -status)
        return bool(status >= 0)

    def items(self) -> Iterator[tuple[int, bytes]]:
        """The keys and values of a hash map that nobody else writes to. Raises KernelError."""
        key = None
        after = ctypes.create_string_buffer(self.spec.key_bytes)
        value = ctypes.create_string_buffer(self.spec.value_bytes)
        while (status := calls().bpf_map_get_next_key(self._fd, key, after)) >= 0:
            key = after.raw
            if calls().bpf_map_lookup_elem(self._fd, key, value) >= 0:
                yield int.from_bytes(key, sys.byteorder), value.raw
        if status != -errno.ENOENT:
            raise refusal("read a map", -status)

    def per_cpu(self, key: int, cpus: int) -> bytes:
        """The values of one entry of a per-CPU map, one for each of `cpus` possible CPUs."""
        buffer = ctypes.create_string_buffer(cpus * self.spec.value_bytes)
        status = calls().bpf_map_lookup_elem(self._fd, self._key(key), buffer)
        if status < 0:
            raise refusal(f"read entry {key}", -status)
        return buffer.raw

    def memory_bytes(self) -> int:
        """What it takes of the kernel's, as proc_pid_fdinfo(5) has it."""
        with open(f"/proc/self/fdinfo/{self._fd}") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields.get("memlock", 0))

    def memory(self) -> mmap.mmap:
        """The value of a map that can be mapped, in place.

        No child has it (madvise(2), MADV_DONTFORK): a worker runs other people's code, and
        could write there whom the kernel is to choose.
        """
        memory = mmap.mmap(self._fd, _pages(self.spec.value_bytes))
        memory.madvise(mmap.MADV_DONTFORK)
        return memory

    def _key(self, key: int) -> bytes:
        return key.to_bytes(self.spec.key_bytes, sys.byteorder)


class _Btf(Descriptor):
    """The types that the kernel wants to be told of socket storage: numbers of 4 and of 8 bytes.

    See Documentation/bpf/btf.rst. Raises KernelError.
    """

    KEY, VALUE = 1, 2

    def __init__(self, act: str) -> None:
        names = b"\0u32\0u64\0"
        types = b"".join(
            struct.pack("=IIII", names.index(name), _BTF_INT, size_bytes, 8 * size_bytes)
            for name, size_bytes in ((b"u32", 4), (b"u64", 8))
        )
        header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
        data = header + types + names
        fd = calls().bpf_btf_load(data, len(data), None)
        if fd < 0:
            raise refusal(act, -fd)
        super().__init__(fd)


_BTF_INT = 1 << 24
"""BTF_KIND_INT, as it stands in btf_type.info."""


class Slots:
    """What is known of every slot beside its place in the table, shared with programs."""

    def __init__(self, slots_map: Map) -> None:
        self.map = slots_map
        self._memory = slots_map.memory()

    def begin(self, slot: int) -> int:
        """Somebody new gets the slot, with nothing open; its stamp.

        Another, as a process that the last one left behind may still have connections open.
        """
        _, given, stamp, flows, _ = self._at(slot)
        self._put(slot, 0, given, _after(stamp), flows, 0)
        self.set_open(slot, 0)
        return _after(stamp)

    def end(self, slot: int) -> None:
        """Nothing that was counted for it, or is known to be there, means who comes next."""
        pending, given, stamp, flows, _ = self._at(slot)
        self._put(slot, pending, given, _after(stamp), _after(flows), 0)

    def forget_flows(self, slot: int) -> None:
        """Flows known to be there are to be chosen for anew."""
        slot %= abi.SLOTS  # as programs take a number that is none
        at = abi.SLOTS_OFFSET + slot * abi.SLOT.size + _FLOWS_OFFSET
        (flows,) = struct.unpack_from("=H", self._memory, at)
        struct.pack_into("=H", self._memory, at, _after(flows))

    def open(self, slot: int) -> int:
        """Connections open there."""
        opened: int
        (opened,) = struct.unpack_from("=i", self._memory, abi.OPEN_OFFSET + 4 * slot)
        return max(0, opened)

    def busy(self, below: int) -> Set[int]:
        """The slots below this number that have connections open."""
        opened = self._memory[abi.OPEN_OFFSET : abi.OPEN_OFFSET + 4 * below]
        if opened.count(0) == len(opened):
            return frozenset()
        numbers = struct.unpack(f"={below}i", opened)
        return {slot for slot, number in enumerate(numbers) if number > 0}

    def pulse(self, below: int) -> bytes:
        """Another whenever a connection was opened at a slot below this number, or closed."""
        opened = self._memory[abi.OPEN_OFFSET : abi.OPEN_OFFSET + 4 * below]
        return opened + self._memory[abi.LOAD_BYTES - abi.PACE.size : abi.LOAD_BYTES]

    def set_open(self, slot: int, number: int) -> None:
        """Where they are not counted: what may stand for it, with all handshakes until now."""
        struct.pack_into("=I", self._memory, abi.SLOTS_OFFSET + slot * abi.SLOT.size, 0)
        for at in (abi.OPEN_OFFSET, 0):
            struct.pack_into("=I", self._memory, at + 4 * slot, number)

    def become(self, fd: int) -> None:
        """Stand for another map, as somebody else has left it; the descriptor is ours."""
        self._memory.close()
        self.map.become(fd)
        self._memory = self.map.memory()

    def close(self) -> None:
        self._memory.close()

    def _at(self, slot: int) -> tuple[int, ...]:
        at = abi.SLOTS_OFFSET + slot * abi.SLOT.size
        found: tuple[int, ...] = abi.SLOT.unpack_from(self._memory, at)
        return found

    def _put(self, slot: int, *values: int) -> None:
        abi.SLOT.pack_into(self._memory, abi.SLOTS_OFFSET + slot * abi.SLOT.size, *values)


_FLOWS_OFFSET = 10
"""Of `flows` in struct steer_slot."""


def _after(stamp: int) -> int:
    return (stamp + 1) & 0xFFFF


class Table:
    """The table that programs read, filled in place and flipped by one store.

    The half that is not active is written, then made active. A program that was
    running at the flip may still read the old half: before that one is written
    again, membarrier(2) waits until every such program has ended (its
    MEMBARRIER_CMD_GLOBAL is a synchronize_rcu(), kernel/sched/membarrier.c).
    """

    def __init__(self, table_map: Map) -> None:
        self.map = table_map
        self._memory = table_map.memory()
        (head,) = abi.HEAD.unpack_from(self._memory)
        self._active = int(head & abi.HALF_BYTES != 0)
        self._readers_may_remain = True
        self._flips = 0

    def forget(self) -> None:
        """Choose nobody, before any program runs."""
        nobody = abi.NO_SLOT.to_bytes(2, sys.byteorder)
        places = (abi.HALF_BYTES - abi.LENGTH.size) // len(nobody)
        self.fill({0: abi.LENGTH.pack(0, 0) + nobody * places})

    def rested(self) -> None:
        """No program has run since `PROGRAMS_END_S`."""
        self._readers_may_remain = False

    def fill(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` (offset in a half → bytes) into both halves, before any program runs."""
        for half in (0, 1):
            self._write(half, parts)
        self._point_to(self._active)
        self._readers_may_remain = False

    def amend(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` into the half in use, where programs may find old and new mixed."""
        self._write(self._active, parts)

    def flip(self, parts: Mapping[int, bytes]) -> None:
        """Write `parts` into the idle half and make it active."""
        self.settle()
        idle = 1 - self._active
        self._write(idle, parts)
        if os.uname().machine not in _STORES_IN_ORDER:
            wait_for_programs()
        self._point_to(idle)
        self.unsettle()

    def unsettle(self) -> None:
        """Programs that run now may choose as before, be it by another table."""
        self._readers_may_remain = True
        self._flips += 1

    def settle(self) -> None:
        """Return once no program reads the half that was active before the last flip."""
        if self._readers_may_remain:
            wait_for_programs()
        self._readers_may_remain = False

    def unsettled(self) -> int | None:
        """Which flip the next would wait for: see `settled`. None if it would not wait."""
        return self._flips if self._readers_may_remain else None

    def settled(self, flip: int) -> None:
        """Programs were waited for since that flip, by a call of `unsettled`."""
        if flip == self._flips:
            self._readers_may_remain = False

    def active(self) -> bytes:
        """The half in use."""
        base = self._base(self._active)
        return self._memory[base : base + abi.HALF_BYTES]

    def _point_to(self, half: int) -> None:
        """Make it the active one, by one store that tells how long it is, too."""
        length, deck = abi.LENGTH.unpack_from(self._memory, self._base(half))
        head = length << abi.LENGTH_BIT | deck << abi.DECK_BIT | half * abi.HALF_BYTES
        self._memory[: abi.HEAD.size] = abi.HEAD.pack(head)
        self._active = half

    @staticmethod
    def _base(half: int) -> int:
        return abi.HEADER.size + half * abi.HALF_BYTES

    def _write(self, half: int, parts: Mapping[int, bytes]) -> None:
        base = self._base(half)
        for offset, data in parts.items():
            self._memory[base + offset : base + offset + len(data)] = data

    def close(self) -> None:
        self._memory.close()


class Program(Descriptor):
    """A loaded program.

    Args:
        name: bpftool shows its first 15 characters.
        code: the bytecode.
        maps: the maps it speaks of, by name.
        attach_type: BPF_SK_REUSEPORT_SELECT, …_SELECT_OR_MIGRATE or BPF_CGROUP_SOCK_OPS.
        protocol: of the sockets that it is for.

    Raises:
        VerifierError: the verifier refuses; its log is in `detail`.
        KernelError: not permitted, or not known to this kernel.
    """

    def __init__(
        self,
        name: str,
        code: Code,
        maps: Mapping[str, Map],
        attach_type: int,
        protocol: str = "tcp",
    ) -> None:
        descriptors = {key: value.fileno() for key, value in maps.items()}
        insns = code.linked(descriptors, {"protocol": abi.PROTOCOLS[protocol]})
        self._kind = _KINDS[attach_type]
        options = _LoadOptions(sz=ctypes.sizeof(_LoadOptions), expected_attach_type=attach_type)
        fd = self._load(name, insns, options)
        if fd < 0 and fd not in (-errno.EPERM, -errno.ENOSYS):
            log = ctypes.create_string_buffer(LOG_BYTES)
            options.log_level = 1
            options.log_size = LOG_BYTES
            options.log_buf = ctypes.addressof(log)
            fd = self._load(name, insns, options)
            if fd < 0 and log.value:
                cause = errno.errorcode.get(-fd, str(-fd))
                raise VerifierError(
                    f"load program {name}",
                    cause,
                    detail=shorten(log.value.decode(errors="replace")),
                )
        if fd < 0:
            raise refusal(f"load program {name}", -fd)
        super().__init__(fd)

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
}
"""Type by attach type."""


class Link(Descriptor):
    """A program on a cgroup and all below it, until this is closed. Linux 5.7+.

    Args:
        directory: a descriptor of the cgroup's directory.

    Raises:
        KernelError
    """

    def __init__(self, program: Descriptor, directory: int) -> None:
        attach_type = abi.BPF_CGROUP_SOCK_OPS
        fd = calls().bpf_link_create(program.fileno(), directory, attach_type, None)
        if fd < 0:
            raise refusal("attach to the cgroup", -fd)
        super().__init__(fd)


def shorten(log: str, lines: int = 12) -> str:
    """What matters of a verifier log: its last lines, where it says why it refused."""
    kept = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
    return "\n".join(kept[-lines:])


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def ticks_per_s() -> int:
    """Of the clock that bpf_jiffies64() reads: CONFIG_HZ, by the resolution of the coarse
    clock, see clock_getres(2)."""
    return round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))


_CLOCK_MONOTONIC_COARSE = 6


PROGRAMS_END_S = 0.1
"""No program runs so long."""


def wait_for_programs() -> None:
    """Return once every BPF program that is running now has ended."""
    number = _MEMBARRIER.get(os.uname().machine)
    if number is None or ctypes.CDLL(None).syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        time.sleep(PROGRAMS_END_S)  # nohz_full kernels refuse
