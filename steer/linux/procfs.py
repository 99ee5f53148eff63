"""Reads /proc with a limit on how much is read.

A worker is not trusted. It may have 5,000 threads, wait on a million descriptors, or fork many
processes. The limit keeps the cost of examining it bounded. What exceeds the limit is left out, and
`whole` is then False: callers answer "could not tell", never "no".

If this process may not read about another one, it tries as the user of that process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MOST_READS = 1024
"""The most files, links and directories that are read: this takes 5 to 10 ms."""
MOST_BYTES = 256 << 10
"""The most bytes that are read. A descriptor that is registered with an epoll takes about 90."""
MOST_NAMES = 256
"""The most names of one directory that are read, for example threads of a process."""
EVERYTHING = 1 << 40
"""No limit, for reads that are not periodic."""


class TooMuch(OSError):
    """The limit is reached."""


class Files:
    """Reads files of /proc up to a limit.

    Args:
        root: where proc(5) is mounted.
        most_reads: how many files, links and directories at most.
        most_bytes: how many bytes of all files together at most.

    Attributes:
        whole: whether nothing was left out so far.
        reads: how many files, links and directories were read.
    """

    def __init__(
        self, root: str = "/proc", most_reads: int = MOST_READS, most_bytes: int = MOST_BYTES
    ) -> None:
        self.root = root
        self.whole = True
        self.reads = 0
        self._most_reads = most_reads
        self._most_bytes = self._bytes_left = most_bytes
        self._owners: dict[str, tuple[int, int]] = {}

    @property
    def bytes_read(self) -> int:
        return self._most_bytes - self._bytes_left

    def read(self, path: str) -> bytes:
        """The contents of a file. Raises OSError, TooMuch."""
        self._spend()
        return self._as_owner(path, partial(self._read, path))

    def _read(self, path: str) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            chunks = []
            while chunk := os.read(fd, min(1 << 16, self._bytes_left + 1)):
                self._take(len(chunk))
                chunks.append(chunk)
        finally:
            os.close(fd)
        return b"".join(chunks)

    def memory(self, path: str, address: int, count_bytes: int, most_bytes: int) -> bytes:
        """Memory of a process from `address` on, by proc_pid_mem(5).

        Args:
            most_bytes: read no more than this, as `count_bytes` comes from the process.

        Raises:
            OSError, TooMuch
        """
        self._spend()
        fd = self._as_owner(path, partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            found = os.pread(fd, min(count_bytes, most_bytes), address)
        except OverflowError:  # of a 32-bit process, whose system calls have other numbers
            return b""
        finally:
            os.close(fd)
        self._take(len(found))
        self.whole &= len(found) < most_bytes or count_bytes <= most_bytes
        return found

    def link(self, path: str) -> str:
        """The target of a symbolic link. Raises OSError, TooMuch."""
        self._spend()
        return self._as_owner(path, partial(os.readlink, path))

    def names(self, directory: str, most: int = MOST_NAMES) -> list[str]:
        """The first `most` names in a directory. Raises OSError, TooMuch."""
        self._spend()
        found = self._as_owner(directory, partial(_first_names, directory, most + 1))
        self.whole &= len(found) <= most
        return found[:most]

    def tasks(self, pid: int, most: int = MOST_NAMES) -> list[str]:
        """The directories of the first `most` threads of a process; none if it has ended.

        Raises:
            PermissionError, TooMuch
        """
        try:
            names = self.names(f"{self.root}/{pid}/task", most)
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [f"{self.root}/{pid}/task/{tid}" for tid in names]

    def open_files(self, directory: str) -> Iterator[tuple[int, str]]:
        """The descriptors of a process or thread, and the link of each. Raises OSError, TooMuch."""
        for fd in self.names(f"{directory}/fd", self._most_reads):
            try:
                yield int(fd), self.link(f"{directory}/fd/{fd}")
            except FileNotFoundError:  # it was closed meanwhile
                continue

    def _as_owner(self, path: str, act: Callable[[], T]) -> T:
        """Call `act`. If access is refused, call it again as the owner of the process, and do so
        from the start for everything else of that process."""
        process = path.removeprefix(f"{self.root}/").partition("/")[0]
        try:
            with self._looking_at(process):
                return act()
        except PermissionError:
            if not self._take_owner(process):
                raise
        with self._looking_at(process):
            return act()

    def _looking_at(self, process: str) -> AbstractContextManager[None]:
        owner = self._owners.get(process)
        if owner is None:
            return nullcontext()
        from steer.linux.fsuid import looking_as  # takes ctypes, which is slow to import

        return looking_as(*owner)

    def _take_owner(self, process: str) -> bool:
        """Whether another try as the owner makes sense: the files of a process that is not dumpable
        belong to root."""
        if process in self._owners or os.geteuid() != 0:
            return False
        stat = os.stat(f"{self.root}/{process}")
        if stat.st_uid == 0:
            return False
        self._owners[process] = stat.st_uid, stat.st_gid
        return True

    def _spend(self) -> None:
        if self.reads >= self._most_reads:
            self._give_up()
        self.reads += 1

    def _take(self, count_bytes: int) -> None:
        self._bytes_left -= count_bytes
        if self._bytes_left < 0:
            self._give_up()

    def _give_up(self) -> None:
        self.whole = False
        raise TooMuch("the limit on reading /proc is reached")


def _first_names(directory: str, most: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in islice(entries, most)]
