"""The record: a file beside the control socket that lists the workers of a service.

While the controller or its guard is running, nobody reads it. If both were killed, the workers
still serve and hold the port, and the record is how steer finds them.
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

_LINES_PER_WORKER = 4
"""The file is rewritten when it has this many lines for each worker."""
_MAX_BYTES = 1 << 20

Worker = tuple[int, int]
"""The worker's first process, and the number of the signal that tells it to finish."""


class Record:
    """Writes the file. If the file cannot be written, the service has no record.

    Args:
        control: path of the control socket.
    """

    def __init__(self, control: Path) -> None:
        self._path = claim.record_of(control)
        self._inode: int | None = None
        self._lines = 0

    @property
    def is_there(self) -> bool:
        """Whether the file is the one that we wrote: something may have removed or replaced it."""
        return self._inode is not None and claim.inode(self._path) == self._inode

    def add(self, workers: Collection[Worker], known: Collection[Worker]) -> None:
        """Add workers to the file.

        Args:
            known: all workers, including the added ones. They are written if the file is rewritten.
        """
        if self.is_there and self._lines < _LINES_PER_WORKER * len(known) + 64:
            self._write(workers, os.O_APPEND)
            self._lines += len(workers)
        else:
            self.renew(known)

    def renew(self, workers: Collection[Worker]) -> None:
        """Rewrite the file with these workers."""
        self._write(workers, os.O_TRUNC)
        self._inode, self._lines = claim.inode(self._path), len(workers)

    def _write(self, workers: Iterable[Worker], how: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how
        with suppress(OSError), open(os.open(self._path, flags, 0o600), "w") as stream:
            stream.write("".join(map(_line, workers)))


def living(control: Path) -> list[Worker]:
    """The workers in the record of a service that have not ended.

    Args:
        control: path of the control socket.

    A user can write any process id into a file of theirs. So if the file belongs to a user other
    than root, processes of other users are ignored.
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
    # A worker may have several lines, as its signal may become known only once it runs: the last
    # line counts.
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
    """A line of the file. It includes the start time of the process, because the process id may be
    reused."""
    pid, number = worker
    return f"{pid} {processes.start_time_ticks(pid) or 0} {int(number)}\n"
