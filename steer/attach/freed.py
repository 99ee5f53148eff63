"""Waits until the kernel has freed the sockarray of a program that was detached."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from steer.errors import KernelError

_FREED_S, _AGAIN_S = 5.0, 0.01


def when_freed(join: Callable[[], object]) -> None:
    """Call `join` again for as long as its sockets are still in the other sockarray.

    A socket can be in one only, and the kernel frees a sockarray some time after its program.

    Raises:
        KernelError: `join` failed for another reason, or it took too long.
    """
    end_s = time.monotonic() + _FREED_S
    while True:
        try:
            join()
            return
        except KernelError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end_s:
                raise
        time.sleep(_AGAIN_S)
