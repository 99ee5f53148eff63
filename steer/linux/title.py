"""What ps(1) shows of a process of ours, instead of how it was started."""

from __future__ import annotations

from functools import cache

import msgspec

from steer.linux import processes

CONTROLLER, GUARD, WORKER = "controller", "guard", "worker"
_BEGINS = "steer: "
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
    import ctypes  # not for those who only look

    start, end = _arguments(stat)
    if 0 < start < end:
        room = end - start
        # The last byte stays 0: else the kernel takes the environment for a part of it.
        ctypes.memmove(start, title.encode()[: room - 1].ljust(room, b"\0"), room)


def saved() -> bytes:
    """What ps(1) shows of this process now, for `restore`; empty where the kernel does not say."""
    import ctypes

    start, end = _arguments("/proc/self/stat")
    return ctypes.string_at(start, end - start) if 0 < start < end else b""


def restore(arguments: bytes) -> None:
    """Show again what `saved` returned in this process."""
    import ctypes

    start, end = _arguments("/proc/self/stat")
    if arguments and len(arguments) == end - start:
        ctypes.memmove(start, arguments, len(arguments))


@cache
def _arguments(stat: str) -> tuple[int, int]:
    """Where they begin and end. A child that is forked has them where its parent does."""
    try:
        with open(stat, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[_ARG_START - _BEHIND_COMM]), int(fields[_ARG_END - _BEHIND_COMM])
    except (OSError, ValueError, IndexError):
        return 0, 0


class Title(msgspec.Struct, frozen=True):
    """What a process of a service shows.

    Args:
        role: CONTROLLER, GUARD or WORKER.
        name: of the service.
        is_cut: whether there was no room for more: the name may be longer.
    """

    role: str
    name: str
    is_cut: bool = False

    def may_name(self, service: str) -> bool:
        """Whether it may be a process of that service."""
        return service.startswith(self.name) if self.is_cut else service == self.name


def of(pid: int) -> Title | None:
    """What a process shows; None if it is none of a service, or has ended. Anybody can show
    what they like: it is a hint where to look."""
    line = processes.command_line(pid)
    if line is None or not line.startswith(_BEGINS.encode()):
        return None
    first, *rest = line.decode(errors="replace").removesuffix("\0").split("\0")
    role, _, name = first.removeprefix(_BEGINS).partition(" ")
    if role not in (CONTROLLER, GUARD, WORKER):
        return None
    if role == WORKER:
        _, _, name = name.partition(" ")
    return Title(role, name, is_cut=not rest)
