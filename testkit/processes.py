"""Processes of tests: started, waited for, looked at; and waiting for anything."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from steer.linux import activity
from testkit.confine import setpriv

DEADLINE_S = 60.0
"""For what should happen at once: long, as the machine may be busy with other things."""
T = TypeVar("T")
_TRUE = object()


class HasFileno(Protocol):
    def fileno(self) -> int: ...


def eventually(ask: Callable[[], T], wanted: object = _TRUE, timeout_s: float = DEADLINE_S) -> T:
    """What `ask` answers once it is `wanted`, or once it is true.

    Loopback needs it too: ksoftirqd may deliver after the sender's call returned.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        found = ask()
        if found if wanted is _TRUE else found == wanted:
            return found
        assert time.monotonic() < end_s, f"still {found!r} after {timeout_s:g} s"
        time.sleep(0.01)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """By SIGSTOP, all of them, before it begins."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: all(map(activity.is_stopped, pids)))
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def is_ready(what: HasFileno | int, within_s: float = 0.0, event: int = select.POLLIN) -> bool:
    """Whether there is, within that time, something to read; with POLLOUT, room to write."""
    poll = select.poll()
    poll.register(what, event)
    return bool(poll.poll(1000 * max(0.0, within_s)))


# Processes


@contextmanager
def running(
    *argv: str, fds: Sequence[int] = (), cwd: Path | None = None, stderr: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """A process and the family it starts, all ended afterwards; it has `fds` open."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        pass_fds=fds,
        cwd=cwd,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def python(code: str, *arguments: object) -> tuple[str, ...]:
    """The command that runs it."""
    return (sys.executable, "-c", code, *map(str, arguments))


def line_of(process: subprocess.Popen[str]) -> str:
    """The next that it prints; waits for it."""
    assert process.stdout
    return process.stdout.readline().strip()


def is_running(pid: int) -> bool:
    """Orphans that have ended may stay as zombies where the first process is no init."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open, as /proc shows it; without what it closes meanwhile."""
    found = {}
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[int(each.name)] = os.readlink(each)
    return found


def channel_of(pid: int) -> str:
    """Its end of its channel to the controller, as /proc shows it."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    sequential = {f"socket:[{line.split()[6]}]" for line in lines if line.split()[4] == "0005"}
    (found,) = sequential & set(descriptors(pid).values())
    return found


# Network namespaces


def tcp_count(name: str) -> int:
    """One of netstat(8)'s, of this thread's network namespace."""
    names, values = Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2]
    return int(dict(zip(names.split(), values.split(), strict=True))[name])


# Terminals


# Clients


# What a service leaves behind


def session(number: int) -> list[int]:
    """The processes of a session that are not yet gone."""
    return [pid for pid in _pids() if _session_of(pid) == number]


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _session_of(pid: int) -> int | None:
    """None of a process that has ended, also of one nobody has waited for."""
    try:
        state, _, _, of, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(of)


# Services


DOCKER_CAPABILITIES = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"),
)


AS_IN_DOCKER = setpriv(*DOCKER_CAPABILITIES)
"""Executes a command as root with the capabilities that Docker gives by default."""

PIDFD_GETFD = 438
_REFUSE_NETLINK = """
import ctypes, struct, sys, os, errno
code = [(0x20, 0, 0, 0), (0x15, 0, 3, 41), (0x20, 0, 0, 16), (0x15, 0, 1, 16),
        (0x06, 0, 0, 0x00050000 | errno.EAFNOSUPPORT), (0x06, 0, 0, 0x7FFF0000)]
insns = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(insns)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
WITHOUT_NETLINK = (sys.executable, "-c", _REFUSE_NETLINK)
"""Executes a command that can make no netlink socket, as by RestrictAddressFamilies=."""
