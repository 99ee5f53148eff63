"""System calls that a seccomp filter would end us for, tried by a process that may be ended.

SystemCallFilter= of systemd(5) ends who makes another call than those in its list, unless
SystemCallErrorNumber= is given. What we can do without is then left, as if it had been refused.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from functools import cache

from steer.linux import fork

BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280}.get(os.uname().machine)
"""bpf(2); asm/unistd.h."""
PIDFD_GETFD = 438
"""The same on every architecture but alpha: calls since 5.1 are numbered together."""


@cache
def is_deadly(number: int | None) -> bool:
    """Whether a system call ends the process that makes it.

    Raises:
        OSError: there is no process to try it with.
    """
    if number is None or not _is_filtered():
        return False
    pid, pidfd = fork.fork(lambda: _call(number))
    os.close(pidfd)
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        fork.is_done(pid)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS


def _call(number: int) -> int:
    """With arguments that no call takes for anything."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).syscall(number, -1, -1, -1, -1, -1, -1)
    return 0


def _is_filtered() -> bool:
    """See proc_pid_status(5)."""
    try:
        with open("/proc/self/status", "rb") as file:
            return b"\nSeccomp:\t2\n" in file.read()
    except OSError:
        return False
