"""Finds out which system calls a seccomp filter answers by killing the process.

SystemCallFilter= of systemd.exec(5) kills a process that makes a call which is not in its list,
unless SystemCallErrorNumber= is given. A child process tries the call. If it is killed, steer
treats the call as refused.
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
"""The number on every architecture except alpha, as for all calls since Linux 5.1."""


@cache
def is_deadly(number: int | None) -> bool:
    """Whether a system call kills the process that makes it.

    Raises:
        OSError: no process can be forked to try it.
    """
    if number is None or not _is_filtered():
        return False
    pid, pidfd = fork.fork(lambda: _call(number))
    os.close(pidfd)
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        fork.remove_started(pid)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS


def _call(number: int) -> int:
    """Make the call with arguments that are invalid for every call."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).syscall(number, -1, -1, -1, -1, -1, -1)
    return 0


def _is_filtered() -> bool:
    """Whether a seccomp filter is in force, see Seccomp in proc_pid_status(5)."""
    try:
        with open("/proc/self/status", "rb") as file:
            return b"\nSeccomp:\t2\n" in file.read()
    except OSError:
        return False
