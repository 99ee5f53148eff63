"""Whether a process waits on its sockets: how a server that never notifies is found ready.

`root` is where proc(5) is mounted; tests put a made tree there.
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
from steer.linux.procfs import Files, TooMuch


class Seen(enum.IntEnum):
    """What a look at another process showed; max() of several looks is what they say together.

    Compare with `is`: UNKNOWN is true.
    """

    NO = 0
    UNKNOWN = 1  # it could not be looked at
    YES = 2


def waits_on(
    pid: int, inodes: frozenset[int], root: str = "/proc", machine: str = os.uname().machine
) -> Seen:
    """Whether a thread of `pid`, or of a descendant, is asleep until one of these sockets has
    something for it: how a server that never notifies is found to be ready.

    A thread waits on the sockets named by the system call it is blocked in: accept and the
    receiving calls, poll, select, and an epoll that has the socket registered. Being
    registered is not enough by itself: Tornado and Twisted register first and go on
    starting up. A thread caught running is seen to wait the next time.

    io_uring does not tell which socket a request is for: an accept pending in a process
    that has one of the sockets counts, other requests are UNKNOWN.

    Where the system call may not be read (kernel.yama.ptrace_scope 2) or its numbers are
    not known here, being registered with an epoll is taken for waiting.

    Args:
        inodes: of TCP listeners or UDP sockets, see `socket_inode`.
        machine: what uname(2) calls the processor: it decides the system call numbers.
    """
    files = Files(root)
    looks = _waits(pid, inodes, files, machine)
    if not looks and root == "/proc" and is_hidden(pid):
        return Seen.UNKNOWN
    seen = max(looks.values(), default=Seen.NO)
    return seen if files.whole else max(seen, Seen.UNKNOWN)


def waiters(pid: int, inodes: frozenset[int], root: str = "/proc") -> frozenset[int]:
    """Those of `pid` and its descendants that wait, as `waits_on` has it."""
    seen = _waits(pid, inodes, Files(root), os.uname().machine)
    return frozenset(member for member, look in seen.items() if look is Seen.YES)


def acceptors(pid: int, inodes: frozenset[int], root: str = "/proc") -> frozenset[int]:
    """The threads of `pid` and its descendants that wait, as `waits_on` has it."""
    files, calls = Files(root), _BLOCKING_CALLS.get(os.uname().machine)
    found: set[int] = set()
    with suppress(PermissionError, TooMuch):
        for member in family(pid, files):
            for task in files.tasks(member):
                if _task_waits(task, inodes, files, calls) is Seen.YES:
                    found.add(int(os.path.basename(task)))
    return frozenset(found)


def in_event_loop(
    tids: Iterable[int], root: str = "/proc", machine: str = os.uname().machine
) -> Seen:
    """Whether one of these threads is asleep in epoll_wait(2), poll(2), select(2) or
    io_uring_enter(2), on whatever: it takes the next thing that happens.

    That of a stopped process is, too: see `activity.is_stopped`.
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
    except (PermissionError, TooMuch):  # hidepid=1, or more than one look goes through
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
    except OSError:  # gone, or its memory is
        return Seen.NO
    if fds is not None:
        return _look(task, fds, inodes, files)
    if is_zombie(task):  # nobody but root may look at one
        return Seen.NO
    return max(Seen.UNKNOWN, _look(task, _anonymous(task, files, _EPOLL), inodes, files))


def _awaited_fds(task: str, files: Files, calls: dict[int, _Fds]) -> Iterable[int]:
    """The descriptors that the system call a thread is blocked in waits for."""
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
    """Whether a wait for this descriptor is a wait for one of the sockets."""
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
    """The descriptors of one kind of file that has no name."""
    try:
        return [fd for fd, target in files.open_files(task) if target == kind]
    except OSError:
        return []


def _registered(task: str, epoll: int, files: Files) -> set[int]:
    """The inodes of what is registered with an epoll (proc(5), fdinfo; "ino:" since 4.13)."""
    text = files.read(f"{task}/fdinfo/{epoll}")
    return {int(inode, 16) for inode in _REGISTERED.findall(text)}


_REGISTERED = re.compile(rb"^tfd:.* ino:([0-9a-f]+)", re.MULTILINE)
_IORING_OP_ACCEPT = b"13"


def _ring_covers(task: str, ring: int, inodes: frozenset[int], files: Files) -> Seen:
    """From the pending requests that io_uring/fdinfo.c lists, which name no socket."""
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
    """Of a call that waits for nothing else."""
    return _first(files, task, arguments)


_IORING_ENTER_REGISTERED_RING = 1 << 4


def _entered(files: Files, task: str, arguments: list[int]) -> list[int]:
    """The ring of an io_uring_enter(2); all rings where it was named by a registered index."""
    if arguments[3] & _IORING_ENTER_REGISTERED_RING:
        return _anonymous(task, files, _RING)
    return _first(files, task, arguments)


_MOST_AWAITED_BYTES = 8192
"""Of what poll and select are given: 1,024 and 65,536 descriptors."""


def _polled(files: Files, task: str, arguments: list[int]) -> list[int]:
    """struct pollfd { int fd; short events; short revents; }, see poll(2)."""
    address, count = arguments[0], _int(arguments[1])
    array = files.memory(f"{task}/mem", address, count * 8, _MOST_AWAITED_BYTES)
    entries = struct.iter_unpack("=ihh", array[: len(array) // 8 * 8])
    return [fd for fd, events, _ in entries if events & select.POLLIN]


def _restarted(files: Files, task: str, arguments: list[int]) -> list[int]:
    """A call that SIGSTOP and SIGCONT interrupted, with the arguments it had: poll(2), or one
    that sleeps or waits for a lock (restart_syscall(2))."""
    return _polled(files, task, arguments) if _is_polling(files, task) else []


def _is_polling(files: Files, task: str) -> bool:
    return b"poll" in files.read(f"{task}/wchan")


def _selected(files: Files, task: str, arguments: list[int]) -> Iterable[int]:
    """The fd_set of readers is an array of long with one bit for each descriptor."""
    count, address = _int(arguments[0]), arguments[1]
    if not address:
        return ()
    size_bytes = (count + 63) // 64 * 8
    found = files.memory(f"{task}/mem", address, size_bytes, _MOST_AWAITED_BYTES)
    octets = ((at, octet) for at, octet in enumerate(found) if octet)
    return (8 * at + bit for at, octet in octets for bit in range(8) if octet >> bit & 1)


def _int(register: int) -> int:
    """An int argument is the lower half of its register; the upper may hold anything."""
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
