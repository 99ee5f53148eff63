"""Cuts the output of workers into lines for the log. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

MOST_BYTES = 16384
"""A longer line is shown in parts of this size."""
_GOES_ON = b"\\"

Line = tuple[bytes, bool]
"""A line without its newline, and whether the next one continues it."""


class Lines:
    """Cuts a stream of bytes into lines. A line without a newline is kept until more comes, or
    until `end`."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that are complete with this data, and parts of one that is too long."""
        *whole, self.rest = (self.rest + data).split(b"\n")
        for line in whole:
            while len(line) > MOST_BYTES:
                yield line[:MOST_BYTES], True
                line = line[MOST_BYTES:]
            yield line, False
        while len(self.rest) > MOST_BYTES:
            yield self.rest[:MOST_BYTES], True
            self.rest = self.rest[MOST_BYTES:]

    def end(self) -> Iterator[Line]:
        """The incomplete line that is left, as no more data comes."""
        rest, self.rest = self.rest, b""
        if rest:
            yield rest, False


def shown(
    lines: Iterable[Line], form: str, pid: int, slot: int | None, now_s: float
) -> Iterator[bytes]:
    """The lines of a worker as the log shows them, each with a newline.

    Args:
        form: "text" or "json". As text, a part of a line that is continued ends with a backslash.
        pid, slot: the process ID and the slot of the worker.
        now_s: time.time().
    """
    for line, goes_on in lines:
        if form == "json":
            yield _json(line, goes_on, pid, slot, now_s)
        else:
            yield line + (_GOES_ON if goes_on else b"") + b"\n"


def _json(line: bytes, goes_on: bool, pid: int, slot: int | None, now_s: float) -> bytes:
    fields: dict[str, object] = {"time": round(now_s, 3), "pid": pid, "stream": "worker"}
    if slot is not None:
        fields["slot"] = slot
    fields["message"] = line.decode(errors="replace")
    if goes_on:
        fields["goes_on"] = True
    return msgspec.json.encode(fields) + b"\n"
