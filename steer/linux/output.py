"""Standard error, written to without waiting for who reads it.

What is not taken at once is kept, in its order, and written when it is. Of what workers write
little is ever kept: while anything waits their pipes are not read, and so they wait themselves.
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
"""Of lines of steer's own that wait; more are dropped, and counted."""
_MOST_BYTES = 1 << 24
"""In all: only the last words of very many workers come to so much."""


def _dropped(count: int) -> bytes:
    return f"dropped: {plural(count, 'line')}\n".encode()


class Output:
    """One descriptor that all lines go to, each of them whole.

    Args:
        fd: what to write to; may be replaced by another of its kind.

    Attributes:
        describe: makes the line that tells how many were dropped.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.describe: Callable[[int], bytes] = _dropped
        self.reset()

    def reset(self) -> None:
        """In a process just forked: what waits is its parent's to write."""
        self._waiting = bytearray()
        self._own_bytes = self._dropped = 0
        self._own_fd: int | None = None
        self._cleared: list[Callable[[], None]] = []
        self._blocked: Callable[[], None] | None = None
        self._is_blocked = False

    def fileno(self) -> int:
        """What to wait for until it takes something."""
        if self._own_fd is None:
            self._own_fd = _not_blocking(self._fd)
        return self._own_fd if self._own_fd >= 0 else self._fd

    @property
    def is_clear(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def watch(self, blocked: Callable[[], None] | None) -> None:
        """Call `blocked` when something begins to wait: then `flush` is to be called whenever
        `fileno()` takes something, until it answers that nothing waits any more."""
        self._blocked, self._is_blocked = blocked, False
        self._see_whether_blocked()

    def when_clear(self, call: Callable[[], None]) -> None:
        """Call it once, when nothing waits any more."""
        self._cleared.append(call)

    def say(self, line: bytes) -> None:
        """A line of steer's own."""
        if self._own_bytes > _OWN_MOST_BYTES or len(self._waiting) > _MOST_BYTES:
            self._dropped += 1
            return
        self._own_bytes += len(line)
        self._waiting += line
        self._see_whether_blocked()

    def pass_on(self, lines: Iterable[bytes]) -> None:
        """Lines of a worker's; but for its last not to be read while something waits."""
        for line in lines:
            if len(self._waiting) > _MOST_BYTES:
                self._dropped += 1
            else:
                self._waiting += line
        self._see_whether_blocked()

    def _see_whether_blocked(self) -> None:
        if not self.flush() and not self._is_blocked and self._blocked is not None:
            self._is_blocked = True
            self._blocked()

    def flush(self) -> bool:
        """Write what is taken now; whether that was all."""
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
        """A piece; whether any of it was taken."""
        is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        end = len(self._waiting)
        if not is_file and end > select.PIPE_BUF:
            # So much a pipe takes whole or not at all (pipe(7)): others may write there, too.
            end = self._waiting.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
        try:
            if not is_file and not takes(self.fileno()):
                return False
            written = os.write(self.fileno(), self._waiting[:end])
        except BlockingIOError:
            return False
        except OSError:  # nobody reads it any more, or the disk is full
            written = end
        del self._waiting[:written]
        return True

    def finish(self, within_s: float) -> None:
        """At the end of a process: write what waits, but not for ever."""
        end_s = time.monotonic() + within_s
        while not self.flush() and (left_s := end_s - time.monotonic()) > 0:
            takes(self.fileno(), left_s)

    def close(self) -> None:
        """Close what was opened to write without waiting; it is opened again when needed."""
        fd, self._own_fd = self._own_fd, None
        if fd is not None and fd >= 0:
            os.close(fd)


def takes(fd: int, within_s: float = 0.0) -> bool:
    """Whether it takes PIPE_BUF bytes within that time (poll(2), pipe(7)). Not so a pipe that
    nobody empties or a terminal that is paused."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(1000 * within_s))


def _not_blocking(fd: int) -> int:
    """The pipe anew, if it is one that we may open, or -1: workers may fill it between our look
    and our write, and not to block is a property of what others have open, too (fcntl(2))."""
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return -1


stderr = Output(2)
