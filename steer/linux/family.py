"""Finds all processes of a worker, also those that have left its process group.

The first process of a worker leads a process group, but servers under setsid(1) or an init wrapper,
and daemons that fork twice, are in other groups. The controller is a child subreaper
(PR_SET_CHILD_SUBREAPER of prctl(2)): a process whose parent ends becomes its child. So processes
that outlive a worker are always found among the controller's children.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from steer.errors import KernelError
from steer.linux import fork, processes
from steer.linux.services import first_of

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_inherited: dict[int, int] = {}
"""Children that were there before steer was executed in this process, and when they started."""
_waited_for: dict[int, int] = {}
"""Children of the program that called `steer.run`, which waits for them, and when they started."""
_is_in_program = False
"""Whether this process is a program that called `steer.run`."""


def become_subreaper(is_in_program: bool = False) -> None:
    """Make orphaned descendants children of this process. This survives execve(2).

    Args:
        is_in_program: whether a program called `steer.run` in this process. Then its children are
            no orphans: the program waits for them.
    """
    global _is_in_program
    _is_in_program = is_in_program
    if not is_subreaper():  # otherwise steer has executed itself again: these are its own
        before = _waited_for if is_in_program else _inherited
        before.update(_starts(orphans()))
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
    """Children of this process that it did not fork, including zombies: processes that outlived a
    worker, and children from before steer was executed in this process. Children of a program that
    called `steer.run` are left out, and so is the process group of that program, as it may start
    more of them."""
    found = set(processes.children(os.getpid())) - fork.started()
    # A program that this process is just starting is in its group, and not in `fork.started` yet.
    own = os.getpgrp() if fork.is_starting() or _is_in_program else None
    return sorted(
        pid for pid in found if _group(pid) not in (own, None) and not _is_known(pid, _waited_for)
    )


def left_behind() -> list[int]:
    """Living orphans that a worker may have started. Children from before steer was executed are
    left out, and also the process group of this process, as their own children are in it."""
    own = os.getpgrp()
    found = [pid for pid in orphans() if processes.is_alive(pid) and _group(pid) not in (own, None)]
    return [pid for pid in found if not _is_known(pid, _inherited)]


def reap_orphans() -> tuple[list[int], bool]:
    """Wait for orphans that have ended, so that they do not stay zombies (wait(2)).

    Returns:
        Those that had ended, and whether all orphans were examined.
    """
    return list(filter(_reap, orphans())), not fork.is_starting()


def _reap(pid: int) -> bool:
    """Whether a child has ended, or was waited for elsewhere."""
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


def _starts(pids: Iterable[int]) -> dict[int, int]:
    found = {pid: processes.start_time_ticks(pid) for pid in pids}
    return {pid: began_ticks for pid, began_ticks in found.items() if began_ticks is not None}


def _is_known(pid: int, known: Mapping[int, int]) -> bool:
    return pid in known and known[pid] == processes.start_time_ticks(pid)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


class Family:
    """The processes of one worker.

    A process belongs to the worker if it descends from the worker's first process, is in its
    process group or session, was seen among its descendants, has its mark in the environment, or
    has one of its sockets open.

    Args:
        pid: the process ID of the first process.
        is_child: whether the first process is a child of this process. If not, its orphans have
            another parent, and are searched among all processes.

    Attributes:
        sockets: inodes of the worker's sockets, if known.
        seen: the descendants that `remember` saw, and when they started.
    """

    def __init__(self, pid: int, is_child: bool = True) -> None:
        self.sockets: frozenset[int] = frozenset()
        self.seen: dict[int, int] = {}
        self.pid = pid
        self.is_child = is_child

    def others(self) -> list[int]:
        """The living processes of the worker, without the first."""
        return others([self])[0]

    def remember(self) -> None:
        """Record the current descendants, to know those that leave group and session later."""
        if not processes.may_have_children(self.pid):
            return
        for pid in processes.descendants(self.pid):
            started = processes.start_time_ticks(pid)
            if pid != self.pid and started is not None:
                self.seen[pid] = started

    def kill_group(self) -> None:
        """Send SIGKILL to the first process and its group. `others` finds those in other groups."""
        try:
            self.remember()
        finally:
            fork.kill_group(self.pid)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the worker."""
        kill([self])


def kill(families: Sequence[Family]) -> None:
    """Send SIGKILL to all processes of these workers. Raises OSError, as `others` does."""
    for each in families:
        with suppress(OSError):  # `others` may find those that cannot be recorded
            each.kill_group()
    for pids in others(families):
        send(signal.SIGKILL, pids)


def others(families: Sequence[Family], beside: Collection[int] = ()) -> list[list[int]]:
    """For each worker, its living processes without the first.

    The processes of the machine are listed once for all workers. When a first process has ended,
    its children are children of this process by the time its pidfd is readable (exit_notify() of
    kernel/exit.c).

    Args:
        beside: process groups of other workers, whose processes are not examined.

    Raises:
        OSError: the processes cannot be listed.
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
    """Finds to which of some workers a process belongs, and reads /proc once for all of them."""

    def __init__(self, families: Iterable[Family], beside: Collection[int]) -> None:
        self._beside = beside
        self._by_pid = {each.pid: each for each in families}
        self._by_seen = {seen: each for each in self._by_pid.values() for seen in each.seen.items()}
        self._seen = {pid for pid, _ in self._by_seen}
        self._by_socket = {inode: each for each in self._by_pid.values() for inode in each.sockets}

    def of(self, pid: int) -> Collection[Family]:
        """The workers that a process belongs to; none for the first process of a worker."""
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
    """All processes, without this one and those that it forked, which may hold sockets for a
    worker."""
    started = {os.getpid(), *fork.started()}
    return (pid for pid in processes.all_pids() if pid not in started)


def send(number: int, pids: Iterable[int]) -> None:
    """Send a signal to each process that exists and that this process may signal."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def mark(pid: int) -> int | None:
    """The first process of the worker that a process belongs to, by its environment; None if the
    environment does not say, or cannot be read."""
    return first_of(processes.environment(pid))
