"""A command on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping

from testkit.processes import DEADLINE_S, is_ready


class Terminal:
    """A command on a terminal of its own.

    Args:
        size: rows and columns.
    """

    def __init__(
        self, *command: str, environment: Mapping[str, str], size: tuple[int, int] = (50, 160)
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        self.process = subprocess.Popen(
            command,
            env={**environment, "TERM": "xterm"},
            preexec_fn=lambda: os.login_tty(slave),
            pass_fds=[slave],
        )
        os.close(slave)
        self.shown = ""

    def read_until(self, done: Callable[[str], object]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not done(self.shown):
            assert is_ready(self._master, end_s - time.monotonic()), self.shown
            try:
                self.shown += os.read(self._master, 65536).decode()
            except OSError:  # EIO: nobody has the other end any more
                assert done(self.shown), self.shown

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
