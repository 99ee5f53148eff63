"""Descriptors kept for what cannot wait until others are closed."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_FLAGS = os.O_RDONLY | os.O_CLOEXEC


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
        self._is_roomy = False
        self._fill()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For a moment there is room for so many. Those used for longer are missing until
        there is room again."""
        if self._is_roomy or (len(self._fds) == self._number and self._room() > self._number):
            # To close and open them all takes far longer than to look, and to look longer than
            # not to, where it was looked for whatever this is a part of.
            before, self._is_roomy = self._is_roomy, True
            try:
                yield
            finally:
                self._is_roomy = before
            return
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

    def _room(self) -> int:
        """So many more may be opened; 0 where that is not told, or where no file can be had
        though we may have more (ENFILE of open(2))."""
        try:
            # The number of open descriptors, since Linux 6.2; before, 0.
            used = os.stat("/proc/self/fd").st_size
            os.close(os.open(os.devnull, _FLAGS))
        except OSError:
            return 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return limit - used if used and limit != resource.RLIM_INFINITY else 0

    def _fill(self) -> None:
        while len(self._fds) < self._number:
            self._fds.append(os.open(os.devnull, _FLAGS))
