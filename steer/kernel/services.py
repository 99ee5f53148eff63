"""Services found by their processes: also where a control socket is in no usual place, or gone.

A controller and its guard name themselves (see `title`), and the kernel tells at which path a
socket of theirs listens. Of this network namespace only, as the kernel's table is of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from steer.errors import KernelError
from steer.kernel import proc, title, unix
from steer.kernel.title import GUARD, WORKER, Title

RUNTIME_DIR = "STEER_RUNTIME_DIR"


class Running(msgspec.Struct, frozen=True):
    """A service that runs.

    Args:
        pid: of its controller, or of its guard where there is none.
        inode: of its control socket, as /proc/net/unix has it.
        path: where that was bound. It may be there no more.
    """

    title: Title
    pid: int
    inode: int
    path: Path

    @property
    def is_gone(self) -> bool:
        """Whether its control socket's path was removed: those who have it see it as missing,
        and not only we, as where it is in a container."""
        return not os.path.lexists(f"/proc/{self.pid}/root{self.path}") and proc.is_alive(self.pid)


def find(environment: Mapping[str, str]) -> list[Running]:
    """Those that this user may ask: their own, for root all.

    Where STEER_RUNTIME_DIR is set, only those that were started with the same.
    """
    found: dict[int, Running] = {}
    listening = dict(unix.listening())
    for pid, shown in _processes(environment):
        for inode in _open_in(pid) & listening.keys():
            known = found.get(inode)
            if known is None or known.title.role == GUARD:
                found[inode] = Running(shown, pid, inode, _absolute(pid, listening[inode]))
    return list(found.values())


def names_of_ours() -> set[str]:
    """The names of the services of this user, as their processes show them."""
    user = os.geteuid()
    return {shown.name for pid, shown in _shown() if _owner(pid) == user}


def _processes(environment: Mapping[str, str]) -> Iterator[tuple[int, Title]]:
    user, wanted = os.geteuid(), environment.get(RUNTIME_DIR)
    for pid, shown in _shown():
        is_ours = user in (0, _owner(pid))
        if is_ours and wanted in (None, proc.environment(pid).get(RUNTIME_DIR)):
            yield pid, shown


def _shown() -> Iterator[tuple[int, Title]]:
    for pid in proc.all_pids():
        shown = title.of(pid)
        if shown is not None and shown.role != WORKER:
            yield pid, shown


def _owner(pid: int) -> int | None:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return None


def _open_in(pid: int) -> set[int]:
    with suppress(OSError, KernelError):
        return {inode for _, inode in proc.sockets_by_fd(pid)}
    return set()


def _absolute(pid: int, path: Path) -> Path:
    if not path.is_absolute():
        with suppress(OSError):
            return Path(os.readlink(f"/proc/{pid}/cwd"), path)
    return path
