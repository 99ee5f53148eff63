"""The system calls that wait for descriptors, and the descriptors that a blocked one waits for."""

from __future__ import annotations

import select
import struct
from collections.abc import Callable, Iterable

from steer.linux.procfs import Files

# from a thread's directory and the arguments of its call to the descriptors it waits for
Fds = Callable[[Files, str, list[int]], Iterable[int]]


EPOLL, RING = "anon_inode:[eventpoll]", "anon_inode:[io_uring]"


def anonymous(task: str, files: Files, kind: str) -> list[int]:
    """The descriptors whose link in /proc is `kind`."""
    try:
        return [fd for fd, target in files.open_files(task) if target == kind]
    except OSError:
        return []


def awaited_fds(task: str, files: Files, calls: dict[int, Fds]) -> Iterable[int]:
    """The descriptors that a thread waits for in its system call."""
    number, *arguments = files.read(f"{task}/syscall").split()
    if number == b"running" or int(number) not in calls:
        return ()
    return calls[int(number)](files, task, [int(argument, 16) for argument in arguments])


def first(_files: Files, _task: str, arguments: list[int]) -> list[int]:
    return [_int(arguments[0])]


def one(files: Files, task: str, arguments: list[int]) -> list[int]:
    """The same, for a call that waits for one descriptor only."""
    return first(files, task, arguments)


_IORING_ENTER_REGISTERED_RING = 1 << 4


def _entered(files: Files, task: str, arguments: list[int]) -> list[int]:
    """The ring of an io_uring_enter(2); all rings if the call has a registered index."""
    if arguments[3] & _IORING_ENTER_REGISTERED_RING:
        return anonymous(task, files, RING)
    return first(files, task, arguments)


_MOST_AWAITED_BYTES = 8192
"""How much of the arguments of poll and select is read: 1,024 and 65,536 descriptors."""


def _polled(files: Files, task: str, arguments: list[int]) -> list[int]:
    """struct pollfd { int fd; short events; short revents; }, see poll(2)."""
    address, count = arguments[0], _int(arguments[1])
    array = files.memory(f"{task}/mem", address, count * 8, _MOST_AWAITED_BYTES)
    entries = struct.iter_unpack("=ihh", array[: len(array) // 8 * 8])
    return [fd for fd, events, _ in entries if events & select.POLLIN]


def restarted(files: Files, task: str, arguments: list[int]) -> list[int]:
    """The descriptors of a call that SIGSTOP and SIGCONT interrupted. It keeps its arguments. It is
    poll(2), or a call that sleeps or waits for a lock (restart_syscall(2))."""
    return _polled(files, task, arguments) if is_polling(files, task) else []


def is_polling(files: Files, task: str) -> bool:
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
_X86_64: dict[int, Fds] = {
    **dict.fromkeys((0, 19), one),  # read, readv
    **dict.fromkeys((43, 288), one),  # accept, accept4
    **dict.fromkeys((45, 47, 299), one),  # recvfrom, recvmsg, recvmmsg
    **dict.fromkeys((232, 281, 441), first),  # epoll_wait, epoll_pwait, epoll_pwait2
    426: _entered,  # io_uring_enter
    **dict.fromkeys((7, 271), _polled),  # poll, ppoll
    **dict.fromkeys((23, 270), _selected),  # select, pselect6
    219: restarted,  # restart_syscall
}
# include/uapi/asm-generic/unistd.h
_GENERIC: dict[int, Fds] = {
    **dict.fromkeys((63, 65), one),  # read, readv
    **dict.fromkeys((202, 242), one),  # accept, accept4
    **dict.fromkeys((207, 212, 243), one),  # recvfrom, recvmsg, recvmmsg
    **dict.fromkeys((22, 441), first),  # epoll_pwait, epoll_pwait2
    426: _entered,  # io_uring_enter
    73: _polled,  # ppoll
    72: _selected,  # pselect6
    128: restarted,  # restart_syscall
}
BLOCKING_CALLS = {"x86_64": _X86_64, "aarch64": _GENERIC, "riscv64": _GENERIC}
