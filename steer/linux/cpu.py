"""Which CPU this thread runs on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def current_cpu() -> int:
    """The CPU that this thread ran on a moment ago, or -1 if the kernel cannot tell.

    This is sched_getcpu(3), which `os` does not have.
    """
    return _sched_getcpu()()


@cache
def _sched_getcpu() -> Callable[[], int]:
    # PyDLL keeps the GIL: releasing it would cost more than the call.
    function = ctypes.PyDLL(None).sched_getcpu
    function.argtypes = ()
    function.restype = ctypes.c_int
    return function
