"""What the guard process stores: a value and descriptors."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import msgspec

from steer.guard.channel import Frame

TIES = 3
"""The number of a worker's descriptors that are not its sockets; see `Entry`."""


class Entry(msgspec.Struct, frozen=True):
    """A stored value with descriptors.

    Args:
        value: what the next controller needs to know, up to some megabytes. The value of a worker
            is empty until its registration is complete: if the controller ends before, so does
            the worker.
        fds: descriptors. Those of a worker are its pidfd, the read end of its standard error, its
            channel (see `lifeline`), then its sockets; none once its first process has ended.
        group: the process group of a worker, 0 once no process is left in it; 0 if it is no worker.
        stop_signal: the signal that tells a worker to finish.
    """

    value: bytes
    fds: tuple[int, ...] = ()
    group: int = 0
    stop_signal: int = signal.SIGTERM


NOTHING = Entry(b"")


def sockets_of(entry: Entry) -> Sequence[int]:
    """The descriptors of an entry, for a worker only its sockets."""
    return entry.fds[TIES:] if entry.group else entry.fds


def put_frame(key: str, entry: Entry, wait: bool = False) -> Frame:
    """The message to store it. Its descriptors are sent along."""
    count, number = len(entry.fds), entry.stop_signal
    return Frame("put", key, entry.value, count, entry.group, wait, number)
