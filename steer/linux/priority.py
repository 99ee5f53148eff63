"""The CPU affinity and the niceness of processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

_CAP_SYS_NICE = 23  # include/uapi/linux/capability.h
_NICER_BY, _NICEST = 10, 19  # setpriority(2)


def may_renice_others() -> bool:
    """Whether this process may lower the niceness of other processes (CAP_SYS_NICE)."""
    with open("/proc/self/status") as lines:
        effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_NICE & 1)


def be_nice() -> None:
    """Raise the niceness of this process, so that others get the CPUs first; `renice` undoes it."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, min(own + _NICER_BY, _NICEST))


def renice(pids: Iterable[int]) -> None:
    """Give each thread of these processes the niceness of this one."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, int(task), own)


def pin(pids: Iterable[int], cpus: Sequence[int]) -> None:
    """Pin each thread of these processes to these CPUs, where this process is allowed to."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(task), cpus)
