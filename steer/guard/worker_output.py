"""Passes on what workers write to standard error while there is no controller."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector

import msgspec

from steer.guard.store import StoredEntry
from steer.linux import output
from steer.linux.lines import Line, Lines, shown

_CHUNK_BYTES = 65536
_CHUNKS_AT_END = 16
"""A pipe holds less than this (pipe(7))."""


class WorkerOutput:
    """Reads the standard error of workers and writes it to the log.

    Args:
        form: "text" or "json".
    """

    def __init__(self, selector: BaseSelector, form: str) -> None:
        self._selector = selector
        self._form = form
        self._lines: dict[int, _Lines] = {}

    def begin(self) -> None:
        output.stderr.watch(self._on_blocked)

    def end(self, within_s: float) -> None:
        """Write what is left. What cannot be written within `within_s` is lost."""
        for lines in self._lines.values():
            lines.end()
        output.stderr.watch(None)
        output.stderr.finish(within_s)

    def add(self, stderr: int, entry: StoredEntry) -> None:
        """Start to read the standard error of this worker."""
        os.set_blocking(stderr, False)
        self._lines[stderr] = _Lines(entry, self._form)
        self._listen(stderr)

    def finish(self, stderr: int) -> None:
        """Pass on the rest of the output of a worker that has ended."""
        for _ in range(_CHUNKS_AT_END):
            if not self._hear(stderr):
                break
        self._lines.pop(stderr).end()
        self._forget(stderr)

    def _listen(self, stderr: int) -> None:
        if stderr in self._lines:
            self._selector.register(stderr, EVENT_READ, lambda: self._on_stderr(stderr))

    def _on_stderr(self, stderr: int) -> None:
        """Read only while our own standard error does not block. If it blocks, the worker waits,
        and not this process."""
        if output.stderr.is_clear:
            self._hear(stderr)
        else:
            self._forget(stderr)
            output.stderr.when_clear(lambda: self._listen(stderr))

    def _hear(self, stderr: int) -> bool:
        """Pass on some of what a worker wrote. Returns whether there was any."""
        try:
            data = os.read(stderr, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._forget(stderr)
        self._lines[stderr].pass_on(data)
        return bool(data)

    def _on_blocked(self) -> None:
        self._selector.register(output.stderr, EVENT_WRITE, self._write_on)

    def _write_on(self) -> None:
        if output.stderr.flush():
            self._forget(output.stderr.fileno())

    def _forget(self, fd: int) -> None:
        with suppress(KeyError):
            self._selector.unregister(fd)


class _WithSlot(msgspec.Struct):
    """The slot in the stored value of a worker. Only the controller reads the rest."""

    slot: int | None = None


class _Lines:
    """The output of one worker."""

    def __init__(self, entry: StoredEntry, form: str) -> None:
        self._lines = Lines()
        self._form, self._pid = form, entry.group
        self._slot: int | None = None
        with suppress(msgspec.MsgspecError):  # the stored value need not have a slot
            self._slot = msgspec.json.decode(entry.value, type=_WithSlot).slot

    def pass_on(self, data: bytes) -> None:
        self._show(self._lines.feed(data))

    def end(self) -> None:
        """Pass on a line without an end, too: another process will read the rest of it."""
        self._show(self._lines.end())

    def _show(self, lines: Iterable[Line]) -> None:
        output.stderr.pass_on(shown(lines, self._form, self._pid, self._slot, time.time()))
