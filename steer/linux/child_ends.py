"""A descriptor that is readable when children have ended, used instead of a signal handler.

Python reports each signal to an event loop by a byte in a socket pair (signal.set_wakeup_fd). The
pair has room for 278 bytes, and further ones are lost, whichever signals they stand for. If more
children ended in one iteration of the loop, a SIGTERM after them would be lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

_SIGSET_BYTES = 128
"""sizeof(sigset_t) of glibc and musl."""
_SIGINFO_BYTES = 128
"""struct signalfd_siginfo of signalfd(2)."""


class ChildEnds:
    """A descriptor that is readable from the end of a child until `clear` (signalfd(2)).

    SIGCHLD has to be blocked in all threads for good, as by `signals.hold_signals`.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(self) -> None:
        mask = (1 << (signal.SIGCHLD - 1)).to_bytes(_SIGSET_BYTES, "little")
        libc = ctypes.CDLL(None, use_errno=True)
        # SFD_CLOEXEC and SFD_NONBLOCK have the values of the flags of open(2).
        self._fd: int = libc.signalfd(-1, mask, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        """Make the descriptor unreadable until another child ends."""
        with suppress(BlockingIOError):
            os.read(self._fd, _SIGINFO_BYTES)

    def close(self) -> None:
        os.close(self._fd)
