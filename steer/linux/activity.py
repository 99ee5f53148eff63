"""Finds out from /proc whether other processes do anything: CPU time, context switches, states."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from functools import partial

from steer.linux.processes import family, stat_fields
from steer.linux.procfs import Files, TooMuch

_STOPPED = (b"T", b"t")  # by a signal, by a debugger: proc_pid_stat(5)
_SWITCHES = re.compile(rb"^(?:non)?voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)


def activity(pid: int, root: str = "/proc", among: Collection[int] = ()) -> int:
    """A number that changes when `pid` or a descendant has done anything; 0 if there is no such
    process. It is the sum of their CPU time in clock ticks and of the context switches of their
    threads.

    It mostly grows, but shrinks when threads or processes end, so compare it for equality. It stays
    the same while all of them are stopped, frozen or asleep. If a process has very many threads,
    only the context switches of the first ones are counted.

    Args:
        among: the processes to look at, if at least one of them still exists; otherwise all.
    """
    files = Files(root)
    all_members = family(pid, files)
    members = [member for member in all_members if member in among] or all_members
    ticks = sum(map(partial(_ticks, root=root), members))
    switches = 0
    with suppress(TooMuch, PermissionError):
        for member in members:
            switches += sum(_switches(task, files) for task in files.tasks(member))
    return ticks + switches


def cpu_s(pid: int) -> float:
    """The CPU time of `pid` and its descendants so far. If /proc hides `pid`, only its own."""
    return sum(map(_cpu_clock_s, family(pid, Files()) or [pid]))


def _cpu_clock_s(pid: int) -> float:
    """The CPU time of one process, 0 if it has ended. Readable also with hidepid
    (clock_getcpuclockid(3))."""
    try:
        return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0


_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h


def is_asleep(pid: int) -> bool:
    """Whether `pid` and its descendants sleep until something happens: none of them runs, waits
    for a CPU or a disk, or is stopped. True for a process that /proc hides."""
    return _states(pid).issubset(_ASLEEP)


def is_runnable(pid: int) -> bool:
    """Whether `pid` or a descendant runs or waits for a CPU."""
    return b"R" in _states(pid)


def _states(pid: int) -> set[bytes]:
    stats = (stat_fields(f"/proc/{member}") for member in family(pid, Files()))
    return {stat[0] for stat in stats if stat}


_ASLEEP = (b"S", b"I", b"Z", b"X")


def _ticks(pid: int, root: str) -> int:
    """The CPU time of all threads of a process in clock ticks, also of those that have ended."""
    stat = stat_fields(f"{root}/{pid}")
    return int(stat[11]) + int(stat[12]) if stat else 0


def _switches(task: str, files: Files) -> int:
    try:
        return sum(map(int, _SWITCHES.findall(files.read(f"{task}/status"))))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_stopped(pid: int, root: str = "/proc") -> bool:
    """Whether `pid` or a descendant is stopped, with all its threads, by SIGSTOP or a debugger.

    One stopped process is enough, because steer does not know which process of a worker accepts;
    the shell or master process above it may still run. So this explains why a worker does not
    accept, but does not prove that it does not. If there are very many threads, only the first ones
    are examined.
    """
    files = Files(root)
    with suppress(TooMuch, PermissionError):
        return any(_process_is_stopped(member, files) for member in family(pid, files))
    return False


def _process_is_stopped(pid: int, files: Files) -> bool:
    stats = (stat_fields(task, files.read) for task in files.tasks(pid))
    states = {stat[0] for stat in stats if stat} - {b"Z", b"X"}
    return bool(states) and states.issubset(_STOPPED)


def is_hidden(pid: int) -> bool:
    """Whether a process exists but /proc does not show it to this user (hidepid=2)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not os.path.exists(f"/proc/{pid}")
