"""The capabilities of this process, and of programs that it executes.

See capabilities(7), and PR_SET_NO_NEW_PRIVS in prctl(2).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_VERSION_3 = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3 of include/uapi/linux/capability.h: two words a set."""
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_HIGHEST = 63
_SYS_ADMIN, _PERFMON = 21, 38  # include/uapi/linux/capability.h


class _Header(ctypes.Structure):
    """Mirrors struct __user_cap_header_struct."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Word(ctypes.Structure):
    """Mirrors struct __user_cap_data_struct: 32 capabilities of each set."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def may_perfmon() -> bool:
    """Whether the verifier allows this process all that it allows root, see capabilities(7)."""
    words = _read()
    effective = words[0].effective | words[1].effective << 32
    return bool(effective & (1 << _SYS_ADMIN | 1 << _PERFMON))


def drop_bounding() -> None:
    """Empty the bounding set, if CAP_SETPCAP permits. The other sets stay as they are."""
    for number in range(_HIGHEST + 1):
        # EPERM for every number, or EINVAL for the first one that this kernel does not know.
        if _LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            return


def drop_all() -> None:
    """Drop all capabilities, and set no_new_privs, so that no executed program adds any (by
    set-user-ID or file capabilities).

    Raises:
        OSError: the kernel refuses.
    """
    _clear_ambient()
    _set((_Word * 2)())
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise _error("set no_new_privs")


def drop_inheritable() -> None:
    """Pass no capabilities on to executed programs, except those that root gets anyway.

    Raises:
        OSError: the kernel refuses.
    """
    _clear_ambient()
    words = _read()
    for word in words:
        word.inheritable = 0
    _set(words)


def _clear_ambient() -> None:
    # EINVAL before Linux 4.3, which has no ambient set.
    _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def _read() -> ctypes.Array[_Word]:
    words = (_Word * 2)()
    if _LIBC.capget(ctypes.byref(_Header(_VERSION_3, 0)), words) != 0:
        raise _error("read capabilities")
    return words


def _set(words: ctypes.Array[Any]) -> None:
    if _LIBC.capset(ctypes.byref(_Header(_VERSION_3, 0)), words) != 0:
        raise _error("set capabilities")


def _error(act: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{act}: {os.strerror(number)}")
