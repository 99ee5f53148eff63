"""All processes of a worker, also those that have left its process group.

The first process of a worker leads a process group, but servers under setsid(1), init
wrappers and daemons that fork twice are in others. The controller is a child subreaper
(PR_SET_CHILD_SUBREAPER of prctl(2)): a process whose parent ends becomes its child, so what a
worker leaves behind is found among the controller's children, and nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress

from steer.errors import KernelError
from steer.kernel import proc, process
from steer.kernel.services import first_of

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_inherited: dict[int, int] = {}
"""Children that were there before steer was executed in this process, and when they started."""


def become_subreaper() -> None:
    """From now on orphans below this process become its children. Kept over execve(2)."""
    prctl = ctypes.CDLL(None).prctl
    before = ctypes.c_int()
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if not before.value:  # else it was steer that was executed here before, and they are its own
        _inherited.update(_starts(orphans()))
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans() -> list[int]:
    """Children of this process that it did not fork, zombies among them: what workers left
    behind, and what was there before steer was executed in this process."""
    found = set(proc.children(os.getpid()))
    # While a program of ours is being started it is in our group, and not yet known.
    own = os.getpgrp() if process.is_starting() else None
    return sorted(pid for pid in found - process.started() if _group(pid) not in (own, None))


def left_behind() -> list[int]:
    """Orphans that have not ended and that a worker may have started: none that was there
    before steer, or is in its process group, as what such a one has started is."""
    own = os.getpgrp()
    found = [pid for pid in orphans() if proc.is_alive(pid) and _group(pid) not in (own, None)]
    return [pid for pid in found if _inherited.get(pid) != proc.start_time_ticks(pid)]


def reap_orphans() -> bool:
    """Wait for those that have ended, so that they do not stay as zombies (wait(2)). Whether
    all were looked at."""
    for pid in orphans():
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return not process.is_starting()


def _starts(pids: Iterable[int]) -> dict[int, int]:
    found = {pid: proc.start_time_ticks(pid) for pid in pids}
    return {pid: began_ticks for pid, began_ticks in found.items() if began_ticks is not None}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


class Family:
    """The processes of one worker.

    A process belongs to it that descends from the first one, is in its process group or
    session, was seen among its descendants, has its mark in the environment, or has one of its
    sockets open.

    Args:
        pid: of the first process.
        is_child: whether that is a child of this process. If it is not, orphans went
            elsewhere, and are looked for among all processes.

    Attributes:
        sockets: inodes of the worker's own, as far as known.
    """

    def __init__(self, pid: int, is_child: bool = True) -> None:
        self.sockets: frozenset[int] = frozenset()
        self._pid = pid
        self._is_child = is_child
        self._seen: dict[int, int] = {}

    def others(self) -> list[int]:
        """Those but the first that have not ended."""
        candidates = orphans() if self._is_child else _not_ours()
        owned = (pid for pid in candidates if pid != self._pid and self._owns(pid))
        roots = [self._pid, *owned]
        found = {pid for root in roots for pid in proc.descendants(root)} - {self._pid}
        return sorted(pid for pid in found if proc.is_alive(pid))

    def remember(self) -> None:
        """Note who is there now: those who have left group and session are known later, too."""
        for pid in proc.descendants(self._pid):
            started = proc.start_time_ticks(pid)
            if pid != self._pid and started is not None:
                self._seen[pid] = started

    def kill(self) -> None:
        """SIGKILL to all, the first process included."""
        try:
            self.remember()
        finally:
            process.kill_group(self._pid)
        send(signal.SIGKILL, self.others())

    def _owns(self, pid: int) -> bool:
        try:
            if self._pid in (os.getpgid(pid), os.getsid(pid)):
                return True
        except ProcessLookupError:
            return False
        began_ticks = self._seen.get(pid)
        if began_ticks is not None and began_ticks == proc.start_time_ticks(pid):
            return True
        return mark(pid) == self._pid or self._has_socket(pid)

    def _has_socket(self, pid: int) -> bool:
        if not self.sockets:
            return False
        with suppress(KernelError):
            return any(inode in self.sockets for _, inode in proc.sockets_by_fd(pid))
        return False


def _not_ours() -> Iterator[int]:
    """All processes but this one and those that were forked here, which may hold a worker's
    sockets for it."""
    ours = {os.getpid(), *process.started()}
    return (pid for pid in proc.all_pids() if pid not in ours)


def send(number: int, pids: Iterable[int]) -> None:
    """A signal to each that is still there and ours to signal."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def mark(pid: int) -> int | None:
    """Whose the process says that it is; None where that may not be read or is not said, as of
    one that has ended."""
    return first_of(proc.environment(pid))
