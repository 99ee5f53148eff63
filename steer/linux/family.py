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
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress

from steer.errors import KernelError
from steer.linux import fork, processes
from steer.linux.services import first_of

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_inherited: dict[int, int] = {}
"""Children that were there before steer was executed in this process, and when they started."""


def become_subreaper() -> None:
    """From now on orphans below this process become its children. Kept over execve(2)."""
    if not is_subreaper():  # else it was steer that was executed here before: they are its own
        _inherited.update(_starts(orphans()))
    set_subreaper(True)


def is_subreaper() -> bool:
    """Whether this process is a child subreaper."""
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0)
    return bool(value.value)


def set_subreaper(is_one: bool) -> None:
    """Make this process a child subreaper, or an ordinary process again."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(is_one), 0, 0, 0)


def orphans() -> list[int]:
    """Children of this process that it did not fork, zombies among them: what workers left
    behind, and what was there before steer was executed in this process."""
    found = set(processes.children(os.getpid()))
    # While a program of ours is being started it is in our group, and not yet known.
    own = os.getpgrp() if fork.is_starting() else None
    return sorted(pid for pid in found - fork.started() if _group(pid) not in (own, None))


def left_behind() -> list[int]:
    """Orphans that have not ended and that a worker may have started: none that was there
    before steer, or is in its process group, as what such a one has started is."""
    own = os.getpgrp()
    found = [pid for pid in orphans() if processes.is_alive(pid) and _group(pid) not in (own, None)]
    return [pid for pid in found if _inherited.get(pid) != processes.start_time_ticks(pid)]


def reap_orphans() -> tuple[list[int], bool]:
    """Wait for those that have ended, so that they do not stay as zombies (wait(2)).

    Returns:
        Who had, and whether all were looked at.
    """
    return list(filter(_reap, orphans())), not fork.is_starting()


def _reap(pid: int) -> bool:
    """Whether it has ended."""
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


def _starts(pids: Iterable[int]) -> dict[int, int]:
    found = {pid: processes.start_time_ticks(pid) for pid in pids}
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
        seen: descendants that were there when last looked at, and when they started.
    """

    def __init__(self, pid: int, is_child: bool = True) -> None:
        self.sockets: frozenset[int] = frozenset()
        self.seen: dict[int, int] = {}
        self.pid = pid
        self.is_child = is_child

    def others(self) -> list[int]:
        """Those but the first that have not ended."""
        return others([self])[0]

    def remember(self) -> None:
        """Note who is there now: those who have left group and session are known later, too."""
        if not processes.may_have_children(self.pid):
            return
        for pid in processes.descendants(self.pid):
            started = processes.start_time_ticks(pid)
            if pid != self.pid and started is not None:
                self.seen[pid] = started

    def kill_group(self) -> None:
        """SIGKILL to the first process and its group. `others` finds who has left that."""
        try:
            self.remember()
        finally:
            fork.kill_group(self.pid)

    def kill(self) -> None:
        """SIGKILL to all, the first process included."""
        kill([self])


def kill(families: Sequence[Family]) -> None:
    """All processes of these workers. Raises OSError, as `others`."""
    for each in families:
        with suppress(OSError):  # who cannot be remembered may still be found
            each.kill_group()
    for pids in others(families):
        send(signal.SIGKILL, pids)


def others(families: Sequence[Family], beside: Collection[int] = ()) -> list[list[int]]:
    """Of each worker its processes but the first that have not ended.

    Who there is is listed once for all of them, and asked once whose it is. What a first process
    that has ended left behind is among our children by the time its pidfd is readable
    (exit_notify() of kernel/exit.c).

    Args:
        beside: process groups of other workers, whose processes need no further look.

    Raises:
        OSError: it cannot be listed.
    """
    roots: dict[Family, list[int]] = {each: [] for each in families}
    for is_child in {each.is_child for each in families}:
        owners = _Owners([each for each in families if each.is_child is is_child], beside)
        for pid in orphans() if is_child else _not_ours():
            for family in owners.of(pid):
                roots[family].append(pid)
    return [_below(each, roots[each]) for each in families]


def _below(family: Family, roots: Sequence[int]) -> list[int]:
    found = {pid for root in roots for pid in processes.descendants(root)}
    if processes.may_have_children(family.pid):
        found.update(processes.descendants(family.pid))
    return sorted(pid for pid in found - {family.pid} if processes.is_alive(pid))


class _Owners:
    """Whose a process is, of some workers; what the process tells is read once for all."""

    def __init__(self, families: Iterable[Family], beside: Collection[int]) -> None:
        self._beside = beside
        self._by_pid = {each.pid: each for each in families}
        self._by_seen = {seen: each for each in self._by_pid.values() for seen in each.seen.items()}
        self._seen = {pid for pid, _ in self._by_seen}
        self._by_socket = {inode: each for each in self._by_pid.values() for inode in each.sockets}

    def of(self, pid: int) -> Collection[Family]:
        """None where it is the first of one."""
        if pid in self._by_pid:
            return ()
        try:
            group, session = os.getpgid(pid), os.getsid(pid)
        except ProcessLookupError:
            return ()
        by_group = {group, session} & self._by_pid.keys()
        if by_group or group in self._beside:
            return [self._by_pid[leader] for leader in by_group]
        seen = (pid, processes.start_time_ticks(pid)) if pid in self._seen else None
        if seen in self._by_seen:
            return [self._by_seen[seen]]
        first = mark(pid)
        if first in self._by_pid:
            return [self._by_pid[first]]
        return {self._by_socket[inode] for inode in self._sockets(pid)}

    def _sockets(self, pid: int) -> Collection[int]:
        if not self._by_socket:
            return ()
        with suppress(KernelError):
            return {inode for _, inode in processes.sockets_by_fd(pid)} & self._by_socket.keys()
        return ()


def _not_ours() -> Iterator[int]:
    """All processes but this one and those that were forked here, which may hold a worker's
    sockets for it."""
    ours = {os.getpid(), *fork.started()}
    return (pid for pid in processes.all_pids() if pid not in ours)


def send(number: int, pids: Iterable[int]) -> None:
    """A signal to each that is still there and ours to signal."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def mark(pid: int) -> int | None:
    """Whose the process says that it is; None where that may not be read or is not said, as of
    one that has ended."""
    return first_of(processes.environment(pid))
