"""Descriptors of one worker that the event loop watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class Readers:
    """Knows which of them the loop watches, so that each can be removed at any time."""

    def __init__(self) -> None:
        self._loop: AbstractEventLoop | None = None
        self._fds: set[int] = set()

    def watch(self, loop: AbstractEventLoop) -> None:
        """Use this event loop from here on."""
        self._loop = loop

    def add(self, fd: int, then: Callable[[], object]) -> None:
        """Call `then` whenever there is something to read. Without a loop, do nothing."""
        if self._loop is not None:
            self._loop.add_reader(fd, then)
            self._fds.add(fd)

    def remove(self, fd: int) -> None:
        """Stop watching it, if it is watched."""
        if self._loop is not None and fd in self._fds:
            self._fds.discard(fd)
            self._loop.remove_reader(fd)
