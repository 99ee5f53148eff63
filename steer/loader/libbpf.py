"""Calls of libbpf, and the base class of its file descriptors."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping
from functools import cache
from types import TracebackType
from typing import Self

from steer.errors import KernelError
from steer.linux import filtered


class NoLibrary(KernelError):
    """libbpf is not installed."""


def calls() -> ctypes.CDLL:
    """The library, for calls of bpf(2).

    Raises:
        KernelError: it is not installed, or a seccomp filter would kill this process.
    """
    if filtered.is_deadly(filtered.BPF):
        cure = "let the seccomp filter pass it (systemd: SystemCallFilter=bpf)"
        raise KernelError("call bpf(2)", "EPERM", cure, errno=errno.EPERM)
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
        cure = "install libbpf 1.0 or later (Debian: libbpf1)"
        raise NoLibrary("load libbpf.so.1", str(error), cure, errno=errno.ENOENT) from None
    lib.libbpf_set_print(None)
    # Without these types ctypes would pass 64-bit values as int.
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
    lib.bpf_raw_tracepoint_open.argtypes = (ctypes.c_char_p, ctypes.c_int)
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


def version() -> str:
    """The version of the library, such as "1.1.2". Raises KernelError: it is not installed."""
    ask = libbpf().libbpf_version_string
    ask.restype = ctypes.c_char_p
    return str(ask().decode().removeprefix("v"))


def refusal(act: str, code: int, cures: Mapping[int, str] | None = None) -> KernelError:
    """The error for errno `code` of bpf(2), with the cure if one is known.

    Args:
        cures: by errno, where they are not the usual ones.
    """
    known = {**_CURES, **(cures or {})}
    return KernelError.from_oserror(act, OSError(code, os.strerror(code)), known)


_CURES = {
    errno.EPERM: "needs CAP_BPF: run as root, or see `steer doctor`",
    errno.ENOSYS: "this kernel has no bpf(2)",
    errno.ENOMEM: "raise RLIMIT_MEMLOCK, or the memory limit of the cgroup",
}


class Closed:
    """What `with` closes."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Descriptor(Closed):
    """A file descriptor of bpf(2). Closing it twice does nothing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def become(self, fd: int) -> None:
        """Replace the descriptor by one of the same kind. Takes ownership of `fd`."""
        self.close()
        self._fd = fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
