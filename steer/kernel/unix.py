"""Listening UNIX sockets of this network namespace, those of other users among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LISTENS = 0x10000
"""__SO_ACCEPTCON of include/linux/net.h, as /proc/net/unix shows it (proc_net(5))."""
_FIELDS = 8


def listening(table: str = "/proc/net/unix") -> Iterator[tuple[int, Path]]:
    """Inode and path of each, also in directories that we may not read, or that are gone. Where
    one was bound by a relative path, that is what it is."""
    with suppress(OSError), open(table, errors="surrogateescape") as lines:
        next(lines, "")
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=_FIELDS - 1)
            if len(fields) == _FIELDS and int(fields[3], 16) & _LISTENS:
                yield int(fields[-2]), Path(fields[-1])
