"""A program of somebody else that selects sockets, and the arrays that it selects from."""

from __future__ import annotations

import ctypes
import errno
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence

from steer import abi
from steer.loader.libbpf import Descriptor, calls, refusal

_PROGRAM = struct.Struct("=II8sIIQQQIIQ")
"""Mirrors what struct bpf_prog_info begins with, up to map_ids: type, id, tag, jited_prog_len,
xlated_prog_len, jited_prog_insns, xlated_prog_insns, load_time, created_by_uid, nr_map_ids,
map_ids."""
_MAP = struct.Struct("=IIIIII16s")
"""Mirrors what struct bpf_map_info begins with: type, id, key_size, value_size, max_entries,
map_flags, name."""
_NAME_MAX = 15
"""See BPF_OBJ_NAME_LEN of include/uapi/linux/bpf.h, without the null byte at its end."""
_MAPS_MAX = 64
_CURES = {errno.EPERM: "needs CAP_SYS_ADMIN: run as root"}
"""BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID: see bpf_prog_get_fd_by_id() of the kernel."""


class SocketArray(Descriptor):
    """A map of sockets of one group, by index.

    Args:
        fd: ours.
        size: how many indexes it has.
    """

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd)
        self._size = size

    def cookies(self) -> Mapping[int, int]:
        """The sockets that are in it, by index: their cookies. Raises KernelError."""
        return dict(self._cookies())

    def _cookies(self) -> Iterator[tuple[int, int]]:
        value = ctypes.create_string_buffer(8)
        for index in range(self._size):
            status = calls().bpf_map_lookup_elem(self.fileno(), _key(index), value)
            if status >= 0:
                yield index, int.from_bytes(value.raw, sys.byteorder)
            elif status != -errno.ENOENT:
                raise refusal("read the socket array of another program", -status)

    def remove(self, index: int) -> None:
        """Raises KernelError."""
        status = calls().bpf_map_delete_elem(self.fileno(), _key(index))
        if status < 0 and status != -errno.ENOENT:
            raise refusal("take a socket out of the array of another program", -status)

    def put(self, index: int, fd: int) -> None:
        """Raises KernelError."""
        value = fd.to_bytes(8, sys.byteorder)
        status = calls().bpf_map_update_elem(self.fileno(), _key(index), value, 0)
        if status < 0:
            raise refusal("put a socket back into the array of another program", -status)


class ForeignProgram(Descriptor):
    """One that is loaded; it stays as long as this is open. Needs CAP_SYS_ADMIN.

    Raises:
        KernelError
    """

    def __init__(self, number: int) -> None:
        super().__init__(_by_id("prog", number))

    def socket_arrays(self) -> Sequence[SocketArray]:
        """Those that it selects from. Raises KernelError."""
        found = []
        for number in self._maps():
            fd = _by_id("map", number)
            kind, _, _, _, size, _, _ = _MAP.unpack(_info(fd, bytes(_MAP.size)))
            if kind == abi.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY:
                found.append(SocketArray(fd, size))
            else:
                Descriptor(fd).close()
        return found

    def entry(self, name: str) -> bytes | None:
        """The first entry of the array with that name; None: it uses no such array. Raises
        KernelError."""
        wanted = name.encode()[:_NAME_MAX]
        for number in self._maps():
            with Descriptor(_by_id("map", number)) as array:
                info = _MAP.unpack(_info(array.fileno(), bytes(_MAP.size)))
                kind, _, _, size, _, _, shown = info
                if kind == abi.BPF_MAP_TYPE_ARRAY and shown.rstrip(b"\0") == wanted:
                    return _first_entry(array.fileno(), size)
        return None

    def _maps(self) -> Sequence[int]:
        numbers = (ctypes.c_uint32 * _MAPS_MAX)()
        asked = _PROGRAM.pack(*(0,) * 2, b"", *(0,) * 6, _MAPS_MAX, ctypes.addressof(numbers))
        count = _PROGRAM.unpack_from(_info(self.fileno(), asked))[9]
        return numbers[: min(count, _MAPS_MAX)]


def number_of(program: Descriptor) -> int:
    """The number of a program, by which it is known everywhere. Raises KernelError."""
    number: int = _PROGRAM.unpack(_info(program.fileno(), bytes(_PROGRAM.size)))[1]
    return number


def _by_id(kind: str, number: int) -> int:
    fd: int = getattr(calls(), f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    if fd < 0:
        raise refusal(f"open {kind} {number}", -fd, _CURES)
    return fd


def _info(fd: int, asked: bytes) -> bytes:
    """What BPF_OBJ_GET_INFO_BY_FD says, as far as it was asked for."""
    info = ctypes.create_string_buffer(asked, len(asked))
    length = ctypes.c_uint32(len(asked))
    status = calls().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(length))
    if status < 0:
        raise refusal("look at a program", -status)
    return info.raw


def _first_entry(fd: int, size: int) -> bytes:
    value = ctypes.create_string_buffer(size)
    status = calls().bpf_map_lookup_elem(fd, _key(0), value)
    if status < 0:
        raise refusal("read an array of another program", -status)
    return value.raw


def _key(index: int) -> bytes:
    return index.to_bytes(4, sys.byteorder)
