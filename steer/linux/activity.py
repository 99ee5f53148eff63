"""Signs of life of other processes, as /proc tells them: CPU time, switches, states."""

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
    """A number that changes when `pid` or a descendant has done anything, 0 if there is no
    such process: the clock ticks they ran, and how often their threads were switched.

    It grows, but for threads and processes that end and take their share along: so compare
    for equality. That of a stopped or frozen process stays, that of one that sleeps too. Of
    very many threads only the ticks are seen, and how often the first were switched.

    Args:
        among: those of them to look at, as far as they are still there; if none is, all.
    """
    files = Files(root)
    there = family(pid, files)
    members = [member for member in there if member in among] or there
    ticks = sum(map(partial(_ticks, root=root), members))
    switches = 0
    with suppress(TooMuch, PermissionError):
        for member in members:
            switches += sum(_switches(task, files) for task in files.tasks(member))
    return ticks + switches


def cpu_s(pid: int) -> float:
    """CPU time that `pid` and its descendants have had so far; of a process that /proc hides,
    its own."""
    return sum(map(_cpu_clock_s, family(pid, Files()) or [pid]))


def _cpu_clock_s(pid: int) -> float:
    """0 once it is gone. Anybody may read it, hidepid or not (clock_getcpuclockid(3))."""
    try:
        return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0


_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h


def is_asleep(pid: int) -> bool:
    """Whether `pid` and its descendants sleep until something happens: none of them runs, waits
    for a CPU or a disk, or is stopped. Of a process that /proc hides nothing else is known."""
    return _states(pid).issubset(_ASLEEP)


def is_runnable(pid: int) -> bool:
    """Whether `pid` or a descendant runs, or waits for a CPU to run on."""
    return b"R" in _states(pid)


def _states(pid: int) -> set[bytes]:
    stats = (stat_fields(f"/proc/{member}") for member in family(pid, Files()))
    return {stat[0] for stat in stats if stat}


_ASLEEP = (b"S", b"I", b"Z", b"X")


def _ticks(pid: int, root: str) -> int:
    """Of CPU time, by all its threads, also those that have ended."""
    stat = stat_fields(f"{root}/{pid}")
    return int(stat[11]) + int(stat[12]) if stat else 0


def _switches(task: str, files: Files) -> int:
    try:
        return sum(map(int, _SWITCHES.findall(files.read(f"{task}/status"))))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_stopped(pid: int, root: str = "/proc") -> bool:
    """Whether `pid` or a descendant is stopped, with all its threads, by SIGSTOP or a debugger.

    One process is enough: which of a worker takes the connections is not known, and the
    shell or arbiter above it runs on. So it explains why nobody takes them, and is no sign
    by itself that nobody does. Of very many threads the first are looked at.
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
    """Whether the process runs, and /proc does not show it to us (hidepid=2)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not os.path.exists(f"/proc/{pid}")
