"""Which CPU this thread runs on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def current_cpu() -> int:
    """The CPU this thread ran on a moment ago, or -1 where the kernel cannot tell.

    Source: sched_getcpu(3), a read of the vDSO; `os` has no such call.
    """
    return _sched_getcpu()()


@cache
def _sched_getcpu() -> Callable[[], int]:
    # PyDLL keeps the GIL: releasing it would cost more than the call.
    function = ctypes.PyDLL(None).sched_getcpu
    function.argtypes = ()
    function.restype = ctypes.c_int
    return function
