"""BPF maps: creating, reading and writing them.

A `Map` owns a file descriptor. Nothing is pinned: sockets hold their program, and the program
holds its maps.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import msgspec

from steer import abi
from steer.loader.libbpf import Descriptor, calls, refusal


class _MapOptions(ctypes.Structure):
    """Mirrors struct bpf_map_create_opts of libbpf 1.0. `sz` tells later versions its size."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf", ctypes.c_uint32 * 4),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
    )


class Map(Descriptor):
    """A map that `abi.ALL_MAPS` describes.

    Args:
        name: key of `abi.ALL_MAPS`; bpftool shows it as steer_NAME.
        entries: capacity, if `abi.ALL_MAPS` does not set it.
        kind: BPF_MAP_TYPE_*, in place of the one in `abi.ALL_MAPS`.

    Raises:
        KernelError: the kernel refuses it, or libbpf is missing.
    """

    def __init__(self, name: str, entries: int = 1, kind: int | None = None) -> None:
        self.spec = abi.ALL_MAPS[name]
        if kind is not None:
            self.spec = msgspec.structs.replace(self.spec, kind=kind)
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
        """A map that another process created. Takes ownership of the descriptor."""
        self = cls.__new__(cls)
        self.spec = abi.ALL_MAPS[name]
        self._fd = fd
        return self

    def put(self, key: int, value: bytes) -> None:
        """Set one entry. Raises KernelError."""
        status = calls().bpf_map_update_elem(self._fd, self._key(key), value, 0)
        if status < 0:
            raise refusal(f"put entry {key}", -status)

    def put_socket(self, slot: int, fd: int) -> None:
        """Put the socket `fd` into `slot`. It must be bound, and over TCP it must listen."""
        self.put(slot, fd.to_bytes(8, sys.byteorder))

    def delete(self, key: int) -> None:
        """Delete one entry. It need not exist."""
        status = calls().bpf_map_delete_elem(self._fd, self._key(key))
        # See __sock_map_delete() of net/core/sock_map.c.
        absent = errno.EINVAL if self.spec.kind == abi.BPF_MAP_TYPE_SOCKMAP else errno.ENOENT
        if status < 0 and status != -absent:
            raise refusal(f"delete entry {key}", -status)

    def has(self, key: int) -> bool:
        """Whether the entry exists. In a sockarray it exists while its socket is in a group.

        Raises:
            KernelError
        """
        value = ctypes.create_string_buffer(self.spec.value_bytes)
        status = calls().bpf_map_lookup_elem(self._fd, self._key(key), value)
        if status < 0 and status != -errno.ENOENT:
            raise refusal(f"look for entry {key}", -status)
        return bool(status >= 0)

    def items(self) -> Iterator[tuple[int, bytes]]:
        """The keys and values of a hash map that nothing else is writing to. Raises KernelError."""
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
        """Its kernel memory, from proc_pid_fdinfo(5)."""
        with open(f"/proc/self/fdinfo/{self._fd}") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields.get("memlock", 0))

    def memory(self) -> Memory:
        """The value of a BPF_F_MMAPABLE map, mapped into memory."""
        return Memory(self._fd, _pages(self.spec.value_bytes))

    def _key(self, key: int) -> bytes:
        return key.to_bytes(self.spec.key_bytes, sys.byteorder)


class Memory:
    """A shared mapping of a map. It keeps no descriptor open, as Python's mmap would.

    Children do not inherit the mapping (madvise(2), MADV_DONTFORK). A worker runs other people's
    code, which could otherwise change what the kernel selects. A forked child may have something
    else at that address, so only `close` unmaps it, and only in the process that mapped it.

    Attributes:
        view: the bytes of the map, which can be written.

    Raises:
        KernelError: the kernel refuses the mapping.
    """

    def __init__(self, fd: int, length: int) -> None:
        self._mapped_by = os.getpid()
        self._length = length
        self._address = _LIBC.mmap(None, length, _READ_WRITE, mmap.MAP_SHARED, fd, 0)
        if self._address == _MAP_FAILED:
            raise refusal("map a BPF map into memory", ctypes.get_errno())
        self.advise(mmap.MADV_DONTFORK)
        _memories.add(self)
        content = (ctypes.c_ubyte * length).from_address(self._address)
        self.view = memoryview(content).cast("B")

    def advise(self, advice: int) -> None:
        """See madvise(2)."""
        if self._address is not None:
            _LIBC.madvise(self._address, self._length, advice)

    def close(self) -> None:
        """Unmap the memory. Later uses of `view` raise ValueError. A second call does nothing."""
        address, self._address = self._address, None
        if address is not None and os.getpid() == self._mapped_by:
            self.view.release()
            _LIBC.munmap(address, self._length)


_memories: weakref.WeakSet[Memory] = weakref.WeakSet()


@contextmanager
def inherited() -> Iterator[None]:
    """Let a child that is forked meanwhile inherit all mappings, to go on with our work."""
    for each in _memories:
        each.advise(mmap.MADV_DOFORK)
    try:
        yield
    finally:
        for each in _memories:
            each.advise(mmap.MADV_DONTFORK)


_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FAILED = ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class _Btf(Descriptor):
    """The BTF types that socket storage requires: integers of 4 and 8 bytes.

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
"""BTF_KIND_INT in btf_type.info."""


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def ticks_per_s() -> int:
    """The frequency of bpf_jiffies64(), which is CONFIG_HZ.

    It is derived from the resolution of the coarse clock, see clock_getres(2).
    """
    return round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))


_CLOCK_MONOTONIC_COARSE = 6
