"""Passes on what a worker writes to standard error, line by line, and keeps the last lines."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable

from steer.linux import output
from steer.linux.lines import Line, Lines, shown
from steer.workers.readers import Readers

LAST_WORDS = 20
"""How many lines to keep of each worker."""
_LINE_BYTES = 4096
"""How much to keep of each line."""
_CHUNK_BYTES = 65536
_CHUNKS_AT_END = 16
"""Enough reads for more than a pipe holds (pipe(7))."""


class StandardError:
    """The reading end of a worker's standard error.

    Args:
        fd: the reading end of the pipe; `close` closes it.
        form: the format of the log, "text" or "json".
        slot: the slot of the worker; None: the process is no worker.
    """

    def __init__(self, fd: int, pid: int, form: str, slot: int | None, readers: Readers) -> None:
        self._fd = fd
        self._pid = pid
        self._form = form
        self._slot = slot
        self._readers = readers
        self._words: deque[bytes] = deque(maxlen=LAST_WORDS)
        self._lines = Lines()

    def fileno(self) -> int:
        """The descriptor of the pipe; -1 once it is closed."""
        return self._fd

    def watch(self) -> None:
        """Pass on what the worker writes from now on, until `close`."""
        if self._fd >= 0:
            self._readers.add(self._fd, self._on_readable)

    @property
    def last_words(self) -> str:
        """The last lines."""
        lines = [*self._words, *([self._lines.rest] if self._lines.rest else [])]
        return "\n".join(line.decode(errors="replace") for line in lines[-LAST_WORDS:])

    def read_out(self) -> None:
        """Pass on what is in the pipe. The number of reads is limited, as a process that outlives
        the worker may go on writing."""
        for _ in range(_CHUNKS_AT_END):
            if not self._read():
                break
        self.pass_rest_on()

    def pass_rest_on(self) -> None:
        """Pass on a line that has no end yet, as another process may read the rest of it."""
        self._pass_on(self._lines.end())

    def close(self) -> None:
        """Stop reading, and close the pipe."""
        self._readers.remove(self._fd)
        os.close(self._fd)
        self._fd = -1

    def _on_readable(self) -> None:
        """Pass on what the worker has written. While the controller's own standard error takes
        nothing, the pipe is not read: so the worker blocks, and not the controller."""
        if output.stderr.is_clear:
            self._read()
        else:
            self._readers.remove(self._fd)
            output.stderr.when_clear(self.watch)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._readers.remove(self._fd)
            return False
        self._pass_on(self._lines.feed(data))
        return True

    def _pass_on(self, lines: Iterable[Line]) -> None:
        now = list(lines)
        self._words.extend(line[:_LINE_BYTES] for line, _ in now[-LAST_WORDS:])
        output.stderr.pass_on(shown(now, self._form, self._pid, self._slot, time.time()))
