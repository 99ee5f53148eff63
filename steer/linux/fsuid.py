"""Reads /proc as another user for a moment (setfsuid(2)).

/proc checks ptrace(2) access by the file system user and group ids. Root without CAP_SYS_PTRACE, as
in a container, has no access to processes of other users. But it has CAP_SETUID, as otherwise it
could not run workers as other users. Signals and ptrace(2) access to this process are checked by
other ids, so no process gains anything meanwhile.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4  # include/uapi/linux/prctl.h
_LIBC = ctypes.CDLL(None)


@contextmanager
def looking_as(uid: int, gid: int) -> Iterator[None]:
    """Change the ids of this thread. Without the capabilities to do so, nothing happens."""
    dumpable = _LIBC.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    _set(uid, gid)
    try:
        yield
    finally:
        _set(os.geteuid(), os.getegid())
        # A change of ids clears it, and then others could not read /proc of this process.
        _LIBC.prctl(_PR_SET_DUMPABLE, dumpable, 0, 0, 0)


def _set(uid: int, gid: int) -> None:
    _LIBC.setfsgid(ctypes.c_uint(gid))
    _LIBC.setfsuid(ctypes.c_uint(uid))
