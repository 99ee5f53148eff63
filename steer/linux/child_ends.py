"""A descriptor that is readable when children have ended, where a handler would lose signals.

Python tells an event loop of each signal by a byte in a socket pair (signal.set_wakeup_fd), and a
byte for which there is no room is lost, whichever signal it stands for. 278 fit. When more children
end in one turn of the loop, a SIGTERM that comes after them would never be heard.
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
    """Readable from the end of a child until `clear`, however many end (signalfd(2)).

    SIGCHLD has to be blocked in all threads, as `process.hold_signals` has it, and stays so.

    Raises:
        OSError: no more files.
    """

    def __init__(self) -> None:
        mask = (1 << (signal.SIGCHLD - 1)).to_bytes(_SIGSET_BYTES, "little")
        libc = ctypes.CDLL(None, use_errno=True)
        # Its flags SFD_CLOEXEC and SFD_NONBLOCK are those of open(2).
        self._fd: int = libc.signalfd(-1, mask, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        """From now on it tells of children that end later."""
        with suppress(BlockingIOError):
            os.read(self._fd, _SIGINFO_BYTES)

    def close(self) -> None:
        os.close(self._fd)
