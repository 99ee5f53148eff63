"""Writes to standard error without waiting for its reader.

What cannot be written at once is kept in order and written later. Little output of workers is ever
kept: while anything is kept, their pipes are not read, so the workers wait.
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from steer.values import plural

_OWN_MOST_BYTES = 1 << 18
"""The most bytes of steer's own lines that are kept. Further lines are dropped and counted."""
_MOST_BYTES = 1 << 24
"""The most bytes that are kept. Only the last output of very many workers can reach this."""


def _dropped(count: int) -> bytes:
    return f"dropped: {plural(count, 'line')}\n".encode()


class Output:
    """Writes whole lines to one descriptor.

    Args:
        fd: what to write to; dup2(2) may replace its file.

    Attributes:
        describe: returns the line that says how many lines were dropped.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.describe: Callable[[int], bytes] = _dropped
        self.reset()

    def reset(self) -> None:
        """Drop what is kept. A forked child calls this, because its parent writes that."""
        self._waiting = bytearray()
        self._own_bytes = self._dropped = 0
        self._own_fd: int | None = None
        self._cleared: list[Callable[[], None]] = []
        self._blocked: Callable[[], None] | None = None
        self._is_blocked = False

    def fileno(self) -> int:
        """The descriptor to poll for being writable."""
        if self._own_fd is None:
            self._own_fd = _not_blocking(self._fd)
        return self._own_fd if self._own_fd >= 0 else self._fd

    @property
    def is_clear(self) -> bool:
        """Whether nothing is kept."""
        return not self._waiting

    def watch(self, blocked: Callable[[], None] | None) -> None:
        """Call `blocked` when something has to be kept. From then on, call `flush` whenever
        `fileno()` is writable, until it returns True."""
        self._blocked, self._is_blocked = blocked, False
        self._check_blocked()

    def when_clear(self, call: Callable[[], None]) -> None:
        """Call a function once, when nothing is kept any more."""
        self._cleared.append(call)

    def say(self, line: bytes) -> None:
        """Write a line of steer's own."""
        if self._own_bytes > _OWN_MOST_BYTES or len(self._waiting) > _MOST_BYTES:
            self._dropped += 1
            return
        self._own_bytes += len(line)
        self._waiting += line
        self._check_blocked()

    def pass_on(self, lines: Iterable[bytes]) -> None:
        """Write lines of a worker. While something is kept, read only its last ones."""
        for line in lines:
            if len(self._waiting) > _MOST_BYTES:
                self._dropped += 1
            else:
                self._waiting += line
        self._check_blocked()

    def _check_blocked(self) -> None:
        if not self.flush() and not self._is_blocked and self._blocked is not None:
            self._is_blocked = True
            self._blocked()

    def flush(self) -> bool:
        """Write as much as possible without waiting; whether that was all."""
        while self._waiting or self._dropped:
            if not self._waiting:
                count, self._dropped = self._dropped, 0
                self._waiting += self.describe(count)
            if not self._write():
                return False
        self._own_bytes, self._is_blocked = 0, False
        cleared, self._cleared = self._cleared, []
        for call in cleared:
            call()
        return True

    def _write(self) -> bool:
        """Write a part of what is kept; whether any of it was written."""
        is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        end = len(self._waiting)
        if not is_file and end > select.PIPE_BUF:
            # Up to PIPE_BUF bytes are not mixed with what other processes write (pipe(7)).
            end = self._waiting.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
        try:
            if not is_file and not takes(self.fileno()):
                return False
            written = os.write(self.fileno(), self._waiting[:end])
        except BlockingIOError:
            return False
        except OSError:  # it has no reader any more, or the disk is full
            written = end
        del self._waiting[:written]
        return True

    def finish(self, within_s: float) -> None:
        """Write what is kept, at the end of the process, and wait no longer than `within_s`."""
        end_s = time.monotonic() + within_s
        while not self.flush() and (left_s := end_s - time.monotonic()) > 0:
            takes(self.fileno(), left_s)

    def close(self) -> None:
        """Close the descriptor of `fileno`, which is opened again when needed."""
        fd, self._own_fd = self._own_fd, None
        if fd is not None and fd >= 0:
            os.close(fd)


def takes(fd: int, within_s: float = 0.0) -> bool:
    """Whether a descriptor takes PIPE_BUF bytes within the time (poll(2), pipe(7)). A full pipe and
    a paused terminal do not."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(1000 * within_s))


def _not_blocking(fd: int) -> int:
    """Another descriptor of a pipe with O_NONBLOCK; -1 if it is no pipe or cannot be opened.

    Workers may fill the pipe between poll(2) and write(2). O_NONBLOCK on the original would change
    it for all processes that share the open file (fcntl(2))."""
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return -1


stderr = Output(2)
