"""Descriptors kept for what cannot wait until others are closed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Spare:
    """So many descriptors, open and used for nothing; lent, they are closed.

    Opened early they have low numbers, so that they are of use even where the limit is
    lowered while we run (getrlimit(2): it is one more than the highest number there may be).

    Raises:
        OSError: not even these can be had.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._fds: list[int] = []
        self._lent = 0
        self._fill()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For a moment there is room for so many. Those used for longer are missing until
        there is room again."""
        self._lent += 1
        self.close()
        try:
            yield
        finally:
            self._lent -= 1
            if not self._lent:
                with suppress(OSError):
                    self._fill()

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _fill(self) -> None:
        while len(self._fds) < self._number:
            self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
