"""Which processes are the workers of a service, in a file beside its control socket.

Nobody looks at it as long as the controller or its guard is there to be asked. Where both have
been killed, it is all that tells of the workers, which serve on and hold the port.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from steer.control import claim
from steer.linux import processes

_LONG = 4
"""A file with so many lines for each worker is written anew."""
_MAX_BYTES = 1 << 20

Worker = tuple[int, int]
"""Its first process, and the signal that tells it to finish."""


class Record:
    """The file, as a controller writes it. Where it cannot be written there is none.

    Args:
        control: path of the control socket.
    """

    def __init__(self, control: Path) -> None:
        self._path = claim.record_of(control)
        self._inode: int | None = None
        self._lines = 0

    @property
    def is_there(self) -> bool:
        """Whether it is still what we wrote: whoever cleans directories may have removed it."""
        return self._inode is not None and claim.inode(self._path) == self._inode

    def add(self, workers: Collection[Worker], known: Collection[Worker]) -> None:
        """Some more.

        Args:
            known: all there are, with these.
        """
        if self.is_there and self._lines < _LONG * len(known) + 64:
            self._write(workers, os.O_APPEND)
            self._lines += len(workers)
        else:
            self.renew(known)

    def renew(self, workers: Collection[Worker]) -> None:
        """Write it anew, with these."""
        self._write(workers, os.O_TRUNC)
        self._inode, self._lines = claim.inode(self._path), len(workers)

    def _write(self, workers: Iterable[Worker], how: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how
        with suppress(OSError), open(os.open(self._path, flags, 0o600), "w") as stream:
            stream.write("".join(map(_line, workers)))


def living(control: Path) -> list[Worker]:
    """The workers in the file of a service that have not ended.

    Of a file that is not root's only processes of its owner count: it may name any.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(claim.record_of(control), flags)
    except OSError:
        return []
    with os.fdopen(fd, "rb") as stream:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return []
        lines = stream.read(_MAX_BYTES).splitlines()
    # The last word on each: its signal may become known only once it runs.
    return list(dict(_living(lines, found.st_uid)).items())


def _living(lines: Iterable[bytes], owner: int) -> Iterator[Worker]:
    for line in lines:
        try:
            pid, ticks, number = map(int, line.split())
            is_theirs = owner == 0 or os.stat(f"/proc/{pid}").st_uid == owner
        except (ValueError, OverflowError, OSError):
            continue
        known = pid > 1 and number in signal.valid_signals() and is_theirs
        if known and processes.start_time_ticks(pid) == ticks and processes.is_alive(pid):
            yield pid, number


def _line(worker: Worker) -> str:
    """With its start, which together with its number names it for ever."""
    pid, number = worker
    return f"{pid} {processes.start_time_ticks(pid) or 0} {int(number)}\n"
