"""What a worker writes, line by line, as the log shows it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

MOST_BYTES = 16384
"""Of a longer line so much is shown at a time."""
_GOES_ON = b"\\"

Line = tuple[bytes, bool]
"""Without its end; and whether the next one is its continuation."""


class Lines:
    """Cuts a stream of bytes into lines. Nothing is lost: what has no end yet is a line with
    the next piece, or at the `end`."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that end in this piece, and parts of one that is too long."""
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
        """What is left, as nothing comes any more."""
        rest, self.rest = self.rest, b""
        if rest:
            yield rest, False


def shown(
    lines: Iterable[Line], form: str, pid: int, slot: int | None, now_s: float
) -> Iterator[bytes]:
    """Lines of a worker as they stand in the log, each with its end.

    Args:
        form: "text": as they are, a backslash before an end that is none of theirs; or "json".
        pid, slot: of the worker.
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
