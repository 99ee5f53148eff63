"""What ps(1) shows of a process of ours, instead of how it was started."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_BEHIND_COMM = 3
"""The first field after the name in parentheses is the third of proc_pid_stat(5)."""
_ARG_START, _ARG_END = 48, 49


def show(title: str, stat: str = "/proc/self/stat") -> None:
    """Write `title` over the arguments that we were started with, as far as there is room.

    That is where /proc/PID/cmdline reads from (proc_pid_cmdline(5)). Python has copies of its
    own, so nothing that it knows changes. There is no more room than the arguments took: what
    comes behind is the environment, which C code may still look at. Where the kernel does not
    say where they are, nothing is changed.
    """
    with suppress(OSError, ValueError, IndexError), open(stat, "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
        start, end = (int(fields[number - _BEHIND_COMM]) for number in (_ARG_START, _ARG_END))
        if 0 < start < end:
            room = end - start
            # The last byte stays 0: else the kernel takes the environment for a part of it.
            ctypes.memmove(start, title.encode()[: room - 1].ljust(room, b"\0"), room)
