"""Which CPUs a process may run on, and how eager it is for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

_CAP_SYS_NICE = 23  # include/uapi/linux/capability.h


_NICER_BY, _NICEST = 10, 19  # setpriority(2)


def may_renice_others() -> bool:
    """Whether we may take a process's niceness back (setpriority(2), CAP_SYS_NICE)."""
    with open("/proc/self/status") as lines:
        effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_NICE & 1)


def be_nice() -> None:
    """Lower our own priority, until somebody calls `renice` on us."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, min(own + _NICER_BY, _NICEST))


def renice(pids: Iterable[int]) -> None:
    """Give every thread of these processes the niceness that we have."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, int(task), own)


def pin(pids: Iterable[int], cpus: Sequence[int]) -> None:
    """Have each thread of these processes run on these CPUs, as far as we may tell them to."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(task), cpus)
