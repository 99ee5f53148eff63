"""Listening UNIX sockets of this network namespace, those of other users among them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

_LISTENS = 0x10000
"""__SO_ACCEPTCON of include/linux/net.h, as /proc/net/unix shows it (proc_net(5))."""
_FIELDS = 8
_SEQUENTIAL = "0005"
"""SOCK_SEQPACKET, as it is shown there."""


def listening(table: str = "/proc/net/unix") -> Iterator[tuple[int, Path]]:
    """Inode and path of each, also in directories that we may not read, or that are gone. Where
    one was bound by a relative path, that is what it is."""
    for fields in _rows(table):
        if len(fields) == _FIELDS and int(fields[3], 16) & _LISTENS:
            yield int(fields[-2]), Path(fields[-1])


def may_listen(paths: Collection[Path], table: str = "/proc/net/unix") -> bool:
    """Whether the path of any socket might be one of these. Quicker than to see whether one of
    those that are `listening` is: there may be thousands."""
    with suppress(OSError), open(table, "rb") as lines:
        text = lines.read()
        return any(os.fsencode(path) in text for path in paths)
    return False


def sequential(table: str = "/proc/net/unix") -> set[int]:
    """Inodes of the sockets of type SOCK_SEQPACKET: such as a worker's channel."""
    return {int(fields[6]) for fields in _rows(table) if fields[4] == _SEQUENTIAL}


def _rows(table: str) -> Iterator[list[str]]:
    with suppress(OSError), open(table, errors="surrogateescape") as lines:
        next(lines, "")
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=_FIELDS - 1)
            if len(fields) >= _FIELDS - 1:
                yield fields
