"""Starts threads."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from steer.errors import NoThread


def start(do: Callable[[], object]) -> threading.Thread:
    """Call `do` in a thread that does not keep the process from ending.

    Raises:
        NoThread: the machine has no room for one more.
    """
    thread = threading.Thread(target=do, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # that is all that `threading` says of pthread_create(3)
        cure = "raise the limit on processes (ulimit -u, TasksMax=) or on memory"
        raise NoThread("start a thread", "no more threads", cure, errno=errno.EAGAIN) from None
    return thread
