"""Finds out whether a process waits on its sockets. A server that sends no READY=1 is ready then.

`root` is where proc(5) is mounted; tests pass a directory of their own.
"""

from __future__ import annotations

import enum
import os
import re
import select
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress

from steer.linux.activity import is_hidden
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
    files = Files(root)
    looks = _waits(pid, inodes, files, machine)
    if not looks and root == "/proc" and is_hidden(pid):
        return Seen.UNKNOWN
    seen = max(looks.values(), default=Seen.NO)
    return seen if files.whole else max(seen, Seen.UNKNOWN)


def waiters(pid: int, inodes: frozenset[int], root: str = "/proc") -> frozenset[int]:
    """The processes among `pid` and its descendants that wait, see `waits_on`."""
    seen = _waits(pid, inodes, Files(root), os.uname().machine)
    return frozenset(member for member, look in seen.items() if look is Seen.YES)


def acceptors(pid: int, inodes: frozenset[int], root: str = "/proc") -> frozenset[int]:
    """The threads of `pid` and its descendants that wait, see `waits_on`."""
    files, calls = Files(root), _BLOCKING_CALLS.get(os.uname().machine)
    found: set[int] = set()
    with suppress(PermissionError, TooMuch):
        for member in family(pid, files):
            for task in files.tasks(member):
                if _task_waits(task, inodes, files, calls) is Seen.YES:
                    found.add(int(os.path.basename(task)))
    return frozenset(found)


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
    files, calls = Files(root, EVERYTHING, EVERYTHING), _BLOCKING_CALLS.get(machine)
    found: dict[int, Wait] = {}
    is_known = calls is not None
    try:
        tasks = files.tasks(pid, EVERYTHING)
        for task in tasks if calls else ():
            is_known &= _add_blocked(found, task, inodes, files, calls or {})
        if tasks and not inodes <= found.keys():
            for fd in _anonymous(tasks[0], files, _EPOLL):
                _add(found, tasks[0], fd, _first, inodes, files)
    except PermissionError:
        return None
    return found if is_known or found else None


def _add_blocked(
    found: dict[int, Wait],
    task: str,
    inodes: frozenset[int],
    files: Files,
    calls: dict[int, _Fds],
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
            _add(found, task, fd, fds or _first, inodes, files)
    return True


def _add(
    found: dict[int, Wait], task: str, fd: int, call: _Fds, inodes: frozenset[int], files: Files
) -> None:
    """Add what it means to wait for this descriptor in that call."""
    with suppress(FileNotFoundError, ProcessLookupError):
        target = files.link(f"{task}/fd/{fd}")
        if target == _EPOLL:
            found |= _epolled(files.read(f"{task}/fdinfo/{fd}"), inodes)
        elif target == _RING:
            if _ring_covers(task, fd, inodes, files) is Seen.YES:
                found |= dict.fromkeys(inodes - found.keys(), Wait.RING)
        elif (inode := inode_of(target)) in inodes:
            found[inode] = Wait.ACCEPT if call is _one else Wait.POLL


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
    calls = _BLOCKING_CALLS.get(machine, {})
    return max((_is_in_event_loop(tid, Files(root), calls) for tid in tids), default=Seen.NO)


def _is_in_event_loop(tid: int, files: Files, calls: dict[int, _Fds]) -> Seen:
    task = f"{files.root}/{tid}"
    try:
        number = files.read(f"{task}/syscall").split()[0]
        fds = None if number == b"running" else calls.get(int(number))
        if fds is _restarted:
            return Seen.YES if _is_polling(files, task) else Seen.NO
    except PermissionError:
        return Seen.UNKNOWN
    except (OSError, IndexError):  # it has ended
        return Seen.NO
    return Seen.NO if fds in (None, _one) else Seen.YES


def _waits(pid: int, inodes: frozenset[int], files: Files, machine: str) -> dict[int, Seen]:
    calls = _BLOCKING_CALLS.get(machine)
    return {member: _process_waits(member, inodes, files, calls) for member in family(pid, files)}


# from a thread's directory and the arguments of its call to the descriptors it waits for
_Fds = Callable[[Files, str, list[int]], Iterable[int]]


def _process_waits(
    pid: int, inodes: frozenset[int], files: Files, calls: dict[int, _Fds] | None
) -> Seen:
    seen = Seen.NO
    try:
        for task in files.tasks(pid):
            seen = max(seen, _task_waits(task, inodes, files, calls))
            if seen is Seen.YES:
                return seen
    except (PermissionError, TooMuch):  # hidepid=1, or the limit is reached
        return Seen.UNKNOWN
    return seen


def _task_waits(
    task: str, inodes: frozenset[int], files: Files, calls: dict[int, _Fds] | None
) -> Seen:
    try:
        fds = _awaited_fds(task, files, calls) if calls else None
    except PermissionError:
        fds = None
    except TooMuch:
        raise
    except OSError:  # the thread has ended, or its memory is unmapped
        return Seen.NO
    if fds is not None:
        return _look(task, fds, inodes, files)
    if is_zombie(task):  # only root may examine one
        return Seen.NO
    return max(Seen.UNKNOWN, _look(task, _anonymous(task, files, _EPOLL), inodes, files))


def _awaited_fds(task: str, files: Files, calls: dict[int, _Fds]) -> Iterable[int]:
    """The descriptors that a thread waits for in its system call."""
    number, *arguments = files.read(f"{task}/syscall").split()
    if number == b"running" or int(number) not in calls:
        return ()
    return calls[int(number)](files, task, [int(argument, 16) for argument in arguments])


def _look(task: str, fds: Iterable[int], inodes: frozenset[int], files: Files) -> Seen:
    seen = Seen.NO
    for fd in fds:
        seen = max(seen, _covers(task, fd, inodes, files))
        if seen is Seen.YES:
            break
    return seen


def _covers(task: str, fd: int, inodes: frozenset[int], files: Files) -> Seen:
    """Whether a thread that waits for this descriptor waits for one of the sockets."""
    try:
        target = files.link(f"{task}/fd/{fd}")
        if target == _EPOLL:
            return Seen.NO if inodes.isdisjoint(_registered(task, fd, files)) else Seen.YES
        if target == _RING:
            return _ring_covers(task, fd, inodes, files)
    except (PermissionError, TooMuch):
        return Seen.UNKNOWN
    except OSError:
        return Seen.NO
    return Seen.YES if inode_of(target) in inodes else Seen.NO


_EPOLL, _RING = "anon_inode:[eventpoll]", "anon_inode:[io_uring]"


def _anonymous(task: str, files: Files, kind: str) -> list[int]:
    """The descriptors whose link in /proc is `kind`."""
    try:
        return [fd for fd, target in files.open_files(task) if target == kind]
    except OSError:
        return []


def _registered(task: str, epoll: int, files: Files) -> set[int]:
    """The inodes of files registered with an epoll (proc(5), fdinfo; "ino:" since Linux 4.13)."""
    text = files.read(f"{task}/fdinfo/{epoll}")
    return {int(inode, 16) for inode in _REGISTERED.findall(text)}


_REGISTERED = re.compile(rb"^tfd:.* ino:([0-9a-f]+)", re.MULTILINE)
_IORING_OP_ACCEPT = b"13"


def _ring_covers(task: str, ring: int, inodes: frozenset[int], files: Files) -> Seen:
    """Judge by the pending requests of a ring, which do not name sockets (io_uring/fdinfo.c)."""
    pending = re.findall(rb"^\s+op=(\d+)", files.read(f"{task}/fdinfo/{ring}"), re.MULTILINE)
    if not pending:
        return Seen.NO
    if _IORING_OP_ACCEPT not in pending:
        return Seen.UNKNOWN
    has_one = any(inode_of(target) in inodes for _, target in files.open_files(task))
    return Seen.YES if has_one else Seen.UNKNOWN


def _first(_files: Files, _task: str, arguments: list[int]) -> list[int]:
    return [_int(arguments[0])]


def _one(files: Files, task: str, arguments: list[int]) -> list[int]:
    """The same, for a call that waits for one descriptor only."""
    return _first(files, task, arguments)


_IORING_ENTER_REGISTERED_RING = 1 << 4


def _entered(files: Files, task: str, arguments: list[int]) -> list[int]:
    """The ring of an io_uring_enter(2); all rings if the call has a registered index."""
    if arguments[3] & _IORING_ENTER_REGISTERED_RING:
        return _anonymous(task, files, _RING)
    return _first(files, task, arguments)


_MOST_AWAITED_BYTES = 8192
"""How much of the arguments of poll and select is read: 1,024 and 65,536 descriptors."""


def _polled(files: Files, task: str, arguments: list[int]) -> list[int]:
    """struct pollfd { int fd; short events; short revents; }, see poll(2)."""
    address, count = arguments[0], _int(arguments[1])
    array = files.memory(f"{task}/mem", address, count * 8, _MOST_AWAITED_BYTES)
    entries = struct.iter_unpack("=ihh", array[: len(array) // 8 * 8])
    return [fd for fd, events, _ in entries if events & select.POLLIN]


def _restarted(files: Files, task: str, arguments: list[int]) -> list[int]:
    """The descriptors of a call that SIGSTOP and SIGCONT interrupted. It keeps its arguments. It is
    poll(2), or a call that sleeps or waits for a lock (restart_syscall(2))."""
    return _polled(files, task, arguments) if _is_polling(files, task) else []


def _is_polling(files: Files, task: str) -> bool:
    return b"poll" in files.read(f"{task}/wchan")


def _selected(files: Files, task: str, arguments: list[int]) -> Iterable[int]:
    """The descriptors of select(2), whose fd_set is an array of long with a bit for each."""
    count, address = _int(arguments[0]), arguments[1]
    if not address:
        return ()
    size_bytes = (count + 63) // 64 * 8
    found = files.memory(f"{task}/mem", address, size_bytes, _MOST_AWAITED_BYTES)
    octets = ((at, octet) for at, octet in enumerate(found) if octet)
    return (8 * at + bit for at, octet in octets for bit in range(8) if octet >> bit & 1)


def _int(register: int) -> int:
    """An int argument is the lower half of its register; the upper half is undefined."""
    return register & 0xFFFFFFFF


# arch/x86/entry/syscalls/syscall_64.tbl
_X86_64: dict[int, _Fds] = {
    **dict.fromkeys((0, 19), _one),  # read, readv
    **dict.fromkeys((43, 288), _one),  # accept, accept4
    **dict.fromkeys((45, 47, 299), _one),  # recvfrom, recvmsg, recvmmsg
    **dict.fromkeys((232, 281, 441), _first),  # epoll_wait, epoll_pwait, epoll_pwait2
    426: _entered,  # io_uring_enter
    **dict.fromkeys((7, 271), _polled),  # poll, ppoll
    **dict.fromkeys((23, 270), _selected),  # select, pselect6
    219: _restarted,  # restart_syscall
}
# include/uapi/asm-generic/unistd.h
_GENERIC: dict[int, _Fds] = {
    **dict.fromkeys((63, 65), _one),  # read, readv
    **dict.fromkeys((202, 242), _one),  # accept, accept4
    **dict.fromkeys((207, 212, 243), _one),  # recvfrom, recvmsg, recvmmsg
    **dict.fromkeys((22, 441), _first),  # epoll_pwait, epoll_pwait2
    426: _entered,  # io_uring_enter
    73: _polled,  # ppoll
    72: _selected,  # pselect6
    128: _restarted,  # restart_syscall
}
_BLOCKING_CALLS = {"x86_64": _X86_64, "aarch64": _GENERIC, "riscv64": _GENERIC}
