"""Sends to the guard process, in order; many entries at once if the caller wants that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec
from msgspec.structs import replace

from steer.guard.channel import SAME, Frame
from steer.guard.entry import Entry, put_frame


class Receiver(Protocol):
    def send(self, frames: Sequence[Frame], fds: Sequence[int] = ()) -> None:
        """Raises OSError: EBADF, a descriptor is not open."""


class Outbox:
    """Frames to the guard process.

    Attributes:
        is_together: whether entries are sent at the end of `together`.
    """

    def __init__(self, receiver: Receiver) -> None:
        self.is_together = False
        self._receiver = receiver
        self._entries: dict[str, Entry] = {}
        self._values: dict[str, bytes] = {}
        self._has_to_wait = False

    def send(self, *frames: Frame, fds: Sequence[int] = ()) -> None:
        """Send frames at once, after the entries that wait to be sent."""
        self._flush()
        self._receiver.send(frames, fds)

    def put(self, key: str, new: Entry, old: Entry | None) -> None:
        """Have an entry stored. It replaces `old`, if there is one.

        Raises:
            OSError: EBADF, a descriptor is not open.
        """
        has_others = old is None or old.fds != new.fds
        has_less = old is not None and old.fds != new.fds[: len(old.fds)]
        if has_others and self.is_together:
            self._values.pop(key, None)
            self._entries[key] = new
            self._has_to_wait |= has_less
        elif has_others:
            self.send(put_frame(key, new, wait=has_less), fds=new.fds)
        elif self.is_together and old and new == replace(old, value=new.value):
            self._values[key] = new.value
        else:
            frame = Frame("put", key, new.value, SAME, new.group, stop_signal=new.stop_signal)
            self.send(frame)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collect the entries of a block; send them at its end, in at most two messages, with one
        wait.

        Entries with a new value and the same descriptors are in one message: if steer ends in the
        middle, the guard process has either all of these values or none.

        Raises:
            OSError: as `put`.
        """
        self.is_together = True
        try:
            yield
        finally:
            self.is_together = False
            self._flush()

    def _flush(self) -> None:
        entries, self._entries = self._entries, {}
        values, self._values = self._values, {}
        wait, self._has_to_wait = self._has_to_wait, False
        if entries:
            fds = [fd for entry in entries.values() for fd in entry.fds]
            frames = [put_frame(key, entry) for key, entry in entries.items()]
            frames[-1].wait = wait
            self._receiver.send(frames, fds)
        if values:
            self._receiver.send([Frame("update", value=msgspec.msgpack.encode(values))])
