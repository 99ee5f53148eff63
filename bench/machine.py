"""The machine that is measured on: what it is, and a corner of it for ourselves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

_CLONE_NEWNET = 0x40000000
"""include/uapi/linux/sched.h; `os.unshare` came with Python 3.12."""


def describe() -> dict[str, Any]:
    """What figures depend on, and when they were taken."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "kernel": os.uname().release,
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def is_root() -> bool:
    return os.geteuid() == 0


def leave_network() -> None:
    """Move this process to a network namespace of its own, with nothing but loopback.

    What it starts from now on is in there too; it goes with the last of them.

    Raises:
        OSError: not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare: a network namespace")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """On this CPU alone, and then where it was allowed before."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return os.uname().machine
