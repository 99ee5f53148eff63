"""Looking at what belongs to another user as that user, for a moment (setfsuid(2)).

/proc asks for ptrace(2) access with the file system's user and group. Root without CAP_SYS_PTRACE,
as in a container, has none to processes of other users; but it has CAP_SETUID, or they would not
be other users. Signals and ptrace(2) access to us go by other ids, so nobody gains by it.
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
    """Of this thread only. Without the capabilities for it nothing changes, and nothing is said."""
    dumpable = _LIBC.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    _set(uid, gid)
    try:
        yield
    finally:
        _set(os.geteuid(), os.getegid())
        # A change of user takes that away, and others could look at us no more.
        _LIBC.prctl(_PR_SET_DUMPABLE, dumpable, 0, 0, 0)


def _set(uid: int, gid: int) -> None:
    _LIBC.setfsgid(ctypes.c_uint(gid))
    _LIBC.setfsuid(ctypes.c_uint(uid))
