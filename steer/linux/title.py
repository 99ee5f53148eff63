"""The titles of steer's processes, which ps(1) shows in place of their arguments."""

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
    """Write `title` over the arguments of this process, cut to their length.

    /proc/PID/cmdline reads them from there (proc_pid_cmdline(5)). Python has copies of its own,
    which do not change. The title cannot be longer than the arguments, because the environment
    follows them, which C code may still read. If the kernel does not say where the arguments are,
    nothing is changed.
    """
    import ctypes  # slow to import, and not needed to read titles

    start, end = _arguments(stat)
    if 0 < start < end:
        room = end - start
        # The last byte stays 0: otherwise the kernel shows the environment as well.
        ctypes.memmove(start, title.encode()[: room - 1].ljust(room, b"\0"), room)


def saved() -> bytes:
    """What ps(1) shows of this process now, for `restore`; empty if it cannot be read."""
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
    """Where the arguments begin and end in memory. In a forked child it is the same."""
    try:
        with open(stat, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[_ARG_START - _BEHIND_COMM]), int(fields[_ARG_END - _BEHIND_COMM])
    except (OSError, ValueError, IndexError):
        return 0, 0


class Title(msgspec.Struct, frozen=True):
    """The title of a process of a service.

    Args:
        role: CONTROLLER, GUARD or WORKER.
        name: the name of the service.
        is_cut: whether the name may be longer, because the title was cut.
    """

    role: str
    name: str
    is_cut: bool = False

    def may_name(self, service: str) -> bool:
        """Whether this may be a process of that service."""
        return service.startswith(self.name) if self.is_cut else service == self.name


def of(pid: int) -> Title | None:
    """The title of a process; None if it belongs to no service, or has ended. Any process can
    choose its title, so this is only a hint."""
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
