"""What the guard process stores: a value and descriptors."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import msgspec

from steer.guard.channel import Frame

TIES = 3
"""Descriptors of a worker's that are no sockets of its; see `Entry`."""


class Entry(msgspec.Struct, frozen=True):
    """Something stored.

    Args:
        value: what the controller wants to know of it again, up to some megabytes. A
            worker's is empty until it is complete: should the controller end before, so does
            the worker.
        fds: descriptors. Of a worker: its pidfd, the read end of its standard error, its
            channel (see `lifeline`), then any others; none once its first process has ended.
        group: of a worker: its process group; 0 once nobody is left in it. Else 0.
        stop_signal: of a worker: what tells it to finish.
    """

    value: bytes
    fds: tuple[int, ...] = ()
    group: int = 0
    stop_signal: int = signal.SIGTERM


NOTHING = Entry(b"")


def sockets_of(entry: Entry) -> Sequence[int]:
    """Its descriptors but for those that tie a worker to the controller."""
    return entry.fds[TIES:] if entry.group else entry.fds


def put_frame(key: str, entry: Entry, wait: bool = False) -> Frame:
    """The message that has it stored; its descriptors go with that."""
    count, number = len(entry.fds), entry.stop_signal
    return Frame("put", key, entry.value, count, entry.group, wait, number)
