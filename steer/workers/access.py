"""Why steer cannot look at another process or borrow its sockets, and what would help.

`root` is where proc(5) is mounted; tests give a directory with files of their own.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

import msgspec

from steer import features
from steer.errors import KernelError, Note
from steer.linux import fork
from steer.linux.activity import is_hidden
from steer.linux.processes import socket_inode
from steer.linux.procfs import Files
from steer.sockets.listeners import Borrower

_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h
_GIVE_PTRACE = "give CAP_SYS_PTRACE (Docker: --cap-add SYS_PTRACE; systemd: CapabilityBoundingSet=)"


_OF_ANOTHER_USER = Note(
    "workers run as another user, and CAP_SYS_PTRACE is not held",
    f"{_GIVE_PTRACE}, or run steer as that user",
)


class Access(msgspec.Struct, frozen=True):
    """Why steer may not do something to a process; None: it may.

    Args:
        look: see which system call it waits in and which files it has open.
        borrow: duplicate its sockets for a moment.
    """

    look: Note | None = None
    borrow: Note | None = None


class Facts(msgspec.Struct, frozen=True):
    """What decides whether steer may look at a process.

    Args:
        is_hidden: whether the process cannot be found in /proc at all.
        hidepid: whether /proc is mounted with that option.
        same_user: whether it runs as the same user as steer.
        may_ptrace: whether steer has CAP_SYS_PTRACE.
        ptrace_scope: kernel.yama.ptrace_scope; None if the kernel has no Yama.
        is_filtered: whether a seccomp filter applies to steer.
        release: the release of the kernel.
    """

    is_hidden: bool = False
    hidepid: bool = False
    same_user: bool = True
    may_ptrace: bool = False
    ptrace_scope: int | None = None
    is_filtered: bool = False
    release: str = ""


def why_no_look(facts: Facts) -> Note:
    """Why steer cannot read the system call and the open files of a process. Pure."""
    scope = facts.ptrace_scope or 0
    if facts.is_hidden or (facts.hidepid and not facts.may_ptrace and not facts.same_user):
        cure = "mount it without hidepid, or with gid= of a group of ours"
        return Note("/proc is mounted with hidepid", cure)
    if not facts.same_user and not facts.may_ptrace:
        return _OF_ANOTHER_USER
    if scope >= 3 or (scope == 2 and not facts.may_ptrace):
        cure = "sysctl -w kernel.yama.ptrace_scope=1" + (", after a reboot" if scope >= 3 else "")
        return Note(f"kernel.yama.ptrace_scope is {scope}", cure)
    return Note("ptrace(2) access is refused", f"{_GIVE_PTRACE}, or ask the security module")


def why_no_borrowing(facts: Facts, error: KernelError, look: Note | None) -> Note:
    """Why pidfd_getfd(2), which needs the same access as looking, failed. Pure.

    Args:
        error: the error of the attempt.
        look: why steer cannot look at the process, if it cannot.
    """
    if features.BORROW.is_newer_than(facts.release):
        has = f"Linux {features.BORROW.version} has it"
        return Note(f"Linux {facts.release} has no pidfd_getfd(2)", has)
    if look is not None:
        return look
    if not facts.same_user and not facts.may_ptrace:
        return _OF_ANOTHER_USER
    if error.errno in (errno.EPERM, errno.ENOSYS, errno.EACCES) and facts.is_filtered:
        cure = "let it pass (Docker: --cap-add SYS_PTRACE; systemd: SystemCallFilter=pidfd_getfd)"
        return Note("a seccomp filter refuses pidfd_getfd(2)", cure)
    cure = "see ptrace(2), and ask the security module"
    return Note(f"pidfd_getfd(2) says {error.cause}", cure)


def access(pid: int, inodes: frozenset[int]) -> Access:
    """What steer may do to a running process that has these sockets."""
    facts = read(pid)
    look = None if _may_look(pid) else why_no_look(facts)
    borrow = None
    try:
        with Borrower(pid, inodes).borrow():
            pass
    except KernelError as error:
        borrow = why_no_borrowing(facts, error, look)
    return Access(look, borrow)


def access_to(become: Callable[[], None], executes: bool = True) -> Access:
    """What steer may do to a worker; tried with a process that only sleeps.

    Args:
        become: gives up the privileges that a worker gives up; may raise OSError.
        executes: whether a worker executes a command, and so is dumpable (PR_SET_DUMPABLE of
            prctl(2)). A process that is not dumpable can be looked at only with CAP_SYS_PTRACE.

    Raises:
        OSError: the process cannot be started.
    """
    with socket.socket() as sock:
        reading, writing = os.pipe()
        pid, pidfd = fork.fork(lambda: _sleep(become, executes, writing))
        os.close(writing)
        try:
            if not os.read(reading, 1):
                raise OSError(errno.EPERM, "give up privileges")
            return access(pid, frozenset({socket_inode(sock.fileno())}))
        finally:
            os.close(reading)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pidfd)


def _sleep(become: Callable[[], None], executes: bool, sleeping_fd: int) -> int:
    """Sleep like a worker. After a change of user, a process is not dumpable; executing a command
    makes it dumpable again."""
    become()
    if executes:
        fork.be_dumpable()
    os.write(sleeping_fd, b"\0")
    signal.pause()
    return 0


def _may_look(pid: int, root: str = "/proc") -> bool:
    files = Files(root)
    try:
        files.names(f"{root}/{pid}/fd")
        files.read(f"{root}/{pid}/syscall")
    except PermissionError:
        return False
    except OSError as error:
        # gone, or hidden; or a kernel without CONFIG_HAVE_ARCH_TRACEHOOK
        return error.errno != errno.ENOENT or os.path.exists(f"{root}/{pid}/fd")
    return True


def read(pid: int, root: str = "/proc") -> Facts:
    """Read the facts about steer, the system and the process. What cannot be read gets its usual
    value."""
    return Facts(
        is_hidden=is_hidden(pid),
        hidepid=bool(re.search(r" - proc .*\bhidepid=[^0o]", _text(f"{root}/self/mountinfo"))),
        same_user=_field(f"{root}/{pid}/status", "Uid") in ("", str(os.geteuid())),
        may_ptrace=bool(_number(f"{root}/self/status", "CapEff", 16) >> _CAP_SYS_PTRACE & 1),
        ptrace_scope=int(_text(f"{root}/sys/kernel/yama/ptrace_scope") or 0),
        is_filtered=_number(f"{root}/self/status", "Seccomp", 10) > 0,
        release=os.uname().release,
    )


def _number(path: str, field: str, base: int) -> int:
    return int(_field(path, field) or "0", base)


def _field(path: str, field: str) -> str:
    match = re.search(rf"^{field}:\s*(\S+)", _text(path), re.MULTILINE)
    return match[1] if match else ""


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
