"""Keeps descriptors in reserve for acts that must not fail at the limit on open files."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class Spare:
    """A number of descriptors that are open for no other purpose, and closed while they are lent.

    They are opened early, so they have low numbers, and can be used even if the limit is lowered
    later: the limit is one more than the highest number that can be opened (getrlimit(2)).

    Raises:
        OSError: they cannot be opened.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._fds: list[int] = []
        self._lent = 0
        self._is_roomy = False
        self._fill()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Close the reserved descriptors for the length of a block, so that as many can be opened.
        If the block leaves descriptors open, the reserve is filled again once there is room."""
        if self._is_roomy or (len(self._fds) == self._number and self._room() > self._number):
            # Closing and opening them takes far longer than looking for room. Within another
            # `lent`, which has looked, even that is saved.
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
        """How many more descriptors can be opened; 0 if that is not known, or if open(2) fails
        although the limit is not reached (ENFILE)."""
        try:
            # Since Linux 6.2 this is the number of open descriptors; before, 0.
            used = os.stat("/proc/self/fd").st_size
            os.close(os.open(os.devnull, _FLAGS))
        except OSError:
            return 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return limit - used if used and limit != resource.RLIM_INFINITY else 0

    def _fill(self) -> None:
        while len(self._fds) < self._number:
            self._fds.append(os.open(os.devnull, _FLAGS))
