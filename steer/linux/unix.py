"""Lists the UNIX sockets of this network namespace, including those of other users."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

_LISTENS = 0x10000
"""__SO_ACCEPTCON of include/linux/net.h, as /proc/net/unix shows it (proc_net(5))."""
_FIELDS = 8
_SEQUENTIAL = "0005"
"""SOCK_SEQPACKET, as /proc/net/unix shows it."""


def listening(table: str = "/proc/net/unix") -> Iterator[tuple[int, Path]]:
    """The inode and path of each listening socket, also in directories that cannot be read or were
    removed. The path is the one given to bind(2), and may be relative."""
    for fields in _rows(table):
        if len(fields) == _FIELDS and int(fields[3], 16) & _LISTENS:
            yield int(fields[-2]), Path(fields[-1])


def may_listen(paths: Collection[Path], table: str = "/proc/net/unix") -> bool:
    """Whether any socket may have one of these paths. This is faster than `listening` if there are
    thousands of sockets."""
    with suppress(OSError), open(table, "rb") as lines:
        text = lines.read()
        return any(os.fsencode(path) in text for path in paths)
    return False


def sequential(table: str = "/proc/net/unix") -> set[int]:
    """The inodes of all sockets of type SOCK_SEQPACKET, which a worker's channel has."""
    return {int(fields[6]) for fields in _rows(table) if fields[4] == _SEQUENTIAL}


def _rows(table: str) -> Iterator[list[str]]:
    with suppress(OSError), open(table, errors="surrogateescape") as lines:
        next(lines, "")
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=_FIELDS - 1)
            if len(fields) >= _FIELDS - 1:
                yield fields
