"""Which CPUs a process may run on, and how eager it is for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

_CAP_SYS_NICE = 23  # include/uapi/linux/capability.h


_MODEST, _NICEST = 10, 19  # setpriority(2)


def may_hurry_others() -> bool:
    """Whether we may take a process's niceness back (setpriority(2), CAP_SYS_NICE)."""
    with open("/proc/self/status") as lines:
        effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_NICE & 1)


def be_modest() -> None:
    """Leave the CPUs to whoever is not, until somebody calls `hurry`."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, min(own + _MODEST, _NICEST))


def hurry(pids: Iterable[int]) -> None:
    """Have processes no longer be modest: each thread of theirs as eager as we are."""
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
