"""Finds out whether a process waits on its sockets. A server that sends no READY=1 is ready then.

`root` is where proc(5) is mounted; tests pass a directory of their own.
"""

from __future__ import annotations

import enum
import os
import re
import select
from collections.abc import Iterable
from contextlib import suppress

from steer.linux import blocked_calls
from steer.linux.activity import is_hidden
from steer.linux.blocked_calls import Fds
from steer.linux.processes import family, inode_of, is_zombie
from steer.linux.procfs import EVERYTHING, Files, TooMuch


class Seen(enum.IntEnum):
    """What is known of another process; max() combines several answers.

    Compare with `is`, because UNKNOWN is true as a boolean.
    """

    NO = 0
    UNKNOWN = 1  # it could not be looked at
    YES = 2


def waits_on(
    pid: int, inodes: frozenset[int], root: str = "/proc", machine: str = os.uname().machine
) -> Seen:
    """Whether a thread of `pid` or of a descendant sleeps until something arrives at one of these
    sockets.

    A thread waits on the sockets of the system call it is blocked in: accept and the receiving
    calls, poll, select, and an epoll with which the socket is registered. A registered socket alone
    is not enough, because Tornado and Twisted register it before they have started. A thread that
    happens to run is found waiting the next time.

    io_uring does not say which socket a request is for. A pending accept counts if the process has
    one of the sockets open; for other requests the answer is UNKNOWN.

    If the system call cannot be read (kernel.yama.ptrace_scope 2), or its numbers are not known
    for this machine, a socket that is registered with an epoll counts as waited on.

    Args:
        inodes: the inodes of TCP listeners or UDP sockets, see `socket_inode`.
        machine: the processor by uname(2), which determines the system call numbers.
    """
    look = _Look(inodes)
    _look_at_family(pid, look, Files(root), machine)
    return max(map(look.seen, inodes), default=Seen.NO)


def waits_on_each(pid: int, inodes: frozenset[int], root: str = "/proc") -> dict[int, Seen]:
    """The same for each of the sockets, at the cost of one call of `waits_on`."""
    look = _Look(inodes, len(inodes))
    _look_at_family(pid, look, Files(root), os.uname().machine)
    return {inode: look.seen(inode) for inode in inodes}


def waiters(pid: int, inodes: frozenset[int], root: str = "/proc") -> frozenset[int]:
    """The processes among `pid` and its descendants that wait, see `waits_on`."""
    files, calls = Files(root), blocked_calls.BLOCKING_CALLS.get(os.uname().machine)
    looks = {member: _Look(inodes) for member in family(pid, files)}
    for member, look in looks.items():
        _look_at_process(member, look, files, calls)
    return frozenset(member for member, look in looks.items() if look.found)


def acceptors(pid: int, inodes: frozenset[int], root: str = "/proc") -> frozenset[int]:
    """The threads of `pid` and its descendants that wait, see `waits_on`."""
    files, calls = Files(root), blocked_calls.BLOCKING_CALLS.get(os.uname().machine)
    found: set[int] = set()
    with suppress(PermissionError, TooMuch):
        for member in family(pid, files):
            for task in files.tasks(member):
                look = _Look(inodes)
                _look_at_task(task, look, files, calls)
                if look.found:
                    found.add(int(os.path.basename(task)))
    return frozenset(found)


def thread_of_each(pid: int, inodes: frozenset[int], root: str = "/proc") -> dict[int, int]:
    """The thread of a process that waits on each socket, see `waits_on`. Sockets that none is seen
    to wait on are left out."""
    files, calls = Files(root), blocked_calls.BLOCKING_CALLS.get(os.uname().machine)
    found: dict[int, int] = {}
    with suppress(PermissionError, TooMuch):
        for task in files.tasks(pid):
            look = _Look(inodes, len(inodes))
            _look_at_task(task, look, files, calls)
            if not look.is_unsure:
                found = {**dict.fromkeys(look.found, int(os.path.basename(task))), **found}
    return found


class Wait(enum.Enum):
    """How a process waits for a socket. That decides which process the kernel wakes."""

    ACCEPT = "accept"
    """Blocked in accept(2), or in a receiving call: one process is woken, in turn."""
    EXCLUSIVE = "epoll-exclusive"
    """epoll with EPOLLEXCLUSIVE: one process is woken, the first idle one."""
    EPOLL = "epoll"
    """epoll without EPOLLEXCLUSIVE: all are woken."""
    POLL = "poll"
    """poll(2) or select(2): all are woken."""
    RING = "io_uring"


def waits(
    pid: int, inodes: frozenset[int], root: str = "/proc", machine: str = os.uname().machine
) -> dict[int, Wait] | None:
    """The sockets that a process waits for, and how; None if we may not look at it.

    Unlike `waits_on`, this counts a socket that is registered with an epoll even if the process
    is busy at the moment, and does not look at children. An accept that is pending in an io_uring
    counts for every listener of the process.

    Args:
        inodes: sockets that the process has open.
    """
    files, calls = Files(root, EVERYTHING, EVERYTHING), blocked_calls.BLOCKING_CALLS.get(machine)
    found: dict[int, Wait] = {}
    is_known = calls is not None
    try:
        tasks = files.tasks(pid, EVERYTHING)
        for task in tasks if calls else ():
            is_known &= _add_blocked(found, task, inodes, files, calls or {})
        if tasks and not inodes <= found.keys():
            for fd in blocked_calls.anonymous(tasks[0], files, blocked_calls.EPOLL):
                _add(found, tasks[0], fd, blocked_calls.first, inodes, files)
    except PermissionError:
        return None
    return found if is_known or found else None


def _add_blocked(
    found: dict[int, Wait],
    task: str,
    inodes: frozenset[int],
    files: Files,
    calls: dict[int, Fds],
) -> bool:
    """Add what the system call waits for in which a thread is blocked.

    Returns:
        Whether we may read the call. Yama (kernel.yama.ptrace_scope) allows other users only for
        their children, though it allows them to read descriptors.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        try:
            number, *arguments = files.read(f"{task}/syscall").split()
        except PermissionError:
            return False
        fds = None if number == b"running" else calls.get(int(number))
        for fd in fds(files, task, [int(each, 16) for each in arguments]) if fds else ():
            _add(found, task, fd, fds or blocked_calls.first, inodes, files)
    return True


def _add(
    found: dict[int, Wait], task: str, fd: int, call: Fds, inodes: frozenset[int], files: Files
) -> None:
    """Add what it means to wait for this descriptor in that call."""
    with suppress(FileNotFoundError, ProcessLookupError):
        target = files.link(f"{task}/fd/{fd}")
        if target == blocked_calls.EPOLL:
            found |= _epolled(files.read(f"{task}/fdinfo/{fd}"), inodes)
        elif target == blocked_calls.RING:
            accepting = _ring_sockets(task, fd, inodes, files) or frozenset()
            found |= dict.fromkeys(accepting - found.keys(), Wait.RING)
        elif (inode := inode_of(target)) in inodes:
            found[inode] = Wait.ACCEPT if call is blocked_calls.one else Wait.POLL


def _epolled(text: bytes, inodes: frozenset[int]) -> dict[int, Wait]:
    """The sockets that are registered with an epoll for reading (proc_pid_fdinfo(5))."""
    return {
        inode: Wait.EXCLUSIVE if events & _EPOLLEXCLUSIVE else Wait.EPOLL
        for events, inode in ((int(a, 16), int(b, 16)) for a, b in _EVENTS.findall(text))
        if events & select.EPOLLIN and inode in inodes
    }


_EVENTS = re.compile(rb"^tfd:\s*\d+ events:\s*([0-9a-f]+) .* ino:([0-9a-f]+)", re.MULTILINE)
_EPOLLEXCLUSIVE = 1 << 28  # include/uapi/linux/eventpoll.h


def in_event_loop(
    tids: Iterable[int], root: str = "/proc", machine: str = os.uname().machine
) -> Seen:
    """Whether one of these threads sleeps in epoll_wait(2), poll(2), select(2) or
    io_uring_enter(2), so that it handles the next event, whatever that is.

    A thread of a stopped process counts, too: see `activity.is_stopped`.
    """
    calls = blocked_calls.BLOCKING_CALLS.get(machine, {})
    return max((_is_in_event_loop(tid, Files(root), calls) for tid in tids), default=Seen.NO)


def _is_in_event_loop(tid: int, files: Files, calls: dict[int, Fds]) -> Seen:
    task = f"{files.root}/{tid}"
    try:
        number = files.read(f"{task}/syscall").split()[0]
        fds = None if number == b"running" else calls.get(int(number))
        if fds is blocked_calls.restarted:
            return Seen.YES if blocked_calls.is_polling(files, task) else Seen.NO
    except PermissionError:
        return Seen.UNKNOWN
    except (OSError, IndexError):  # it has ended
        return Seen.NO
    return Seen.NO if fds in (None, blocked_calls.one) else Seen.YES


class _Look:
    """What is seen of processes that may wait on sockets.

    Args:
        inodes: the sockets.
        enough: how many of them have to be waited on until no more is read.

    Attributes:
        found: those that are waited on.
        is_unsure: whether something could not be looked at.
    """

    def __init__(self, inodes: frozenset[int], enough: int = 1) -> None:
        self.inodes = inodes
        self.found: set[int] = set()
        self.is_unsure = False
        self._enough = enough

    @property
    def is_done(self) -> bool:
        return len(self.found) >= self._enough

    def seen(self, inode: int) -> Seen:
        if inode in self.found:
            return Seen.YES
        return Seen.UNKNOWN if self.is_unsure else Seen.NO


def _look_at_family(pid: int, look: _Look, files: Files, machine: str) -> None:
    calls = blocked_calls.BLOCKING_CALLS.get(machine)
    members = family(pid, files)
    for member in members:
        if not look.is_done:
            _look_at_process(member, look, files, calls)
    is_hidden_here = not members and files.root == "/proc" and is_hidden(pid)
    look.is_unsure |= is_hidden_here or not files.whole


def _look_at_process(pid: int, look: _Look, files: Files, calls: dict[int, Fds] | None) -> None:
    try:
        for task in files.tasks(pid):
            _look_at_task(task, look, files, calls)
            if look.is_done:
                return
    except (PermissionError, TooMuch):  # hidepid=1, or the limit is reached
        look.is_unsure = True


def _look_at_task(task: str, look: _Look, files: Files, calls: dict[int, Fds] | None) -> None:
    try:
        fds = blocked_calls.awaited_fds(task, files, calls) if calls else None
    except PermissionError:
        fds = None
    except TooMuch:
        raise
    except OSError:  # the thread has ended, or its memory is unmapped
        return
    if fds is None:
        if is_zombie(task):  # only root may examine one
            return
        look.is_unsure = True
        fds = blocked_calls.anonymous(task, files, blocked_calls.EPOLL)
    for fd in fds:
        _look_at_awaited(task, fd, look, files)
        if look.is_done:
            return


def _look_at_awaited(task: str, fd: int, look: _Look, files: Files) -> None:
    """Add the sockets that a thread waits for if it waits for this descriptor."""
    try:
        target = files.link(f"{task}/fd/{fd}")
        if target == blocked_calls.EPOLL:
            look.found |= look.inodes & _registered(task, fd, files)
        elif target == blocked_calls.RING:
            accepting = _ring_sockets(task, fd, look.inodes, files)
            look.found |= accepting or frozenset()
            look.is_unsure |= accepting is None
        else:
            look.found |= look.inodes & {inode_of(target)}
    except (PermissionError, TooMuch):
        look.is_unsure = True
    except OSError:
        return


def _registered(task: str, epoll: int, files: Files) -> set[int]:
    """The inodes of files registered with an epoll (proc(5), fdinfo; "ino:" since Linux 4.13)."""
    text = files.read(f"{task}/fdinfo/{epoll}")
    return {int(inode, 16) for inode in _REGISTERED.findall(text)}


_REGISTERED = re.compile(rb"^tfd:.* ino:([0-9a-f]+)", re.MULTILINE)
_IORING_OP_ACCEPT = b"13"


def _ring_sockets(
    task: str, ring: int, inodes: frozenset[int], files: Files
) -> frozenset[int] | None:
    """The sockets that the pending requests of a ring may be for, as these do not name them
    (io_uring/fdinfo.c). None: that cannot be told."""
    pending = re.findall(rb"^\s+op=(\d+)", files.read(f"{task}/fdinfo/{ring}"), re.MULTILINE)
    if not pending:
        return frozenset()
    if _IORING_OP_ACCEPT not in pending:
        return None
    return inodes.intersection(inode_of(target) for _, target in files.open_files(task)) or None
