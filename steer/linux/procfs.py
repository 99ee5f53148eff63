"""The door to /proc for a look at a worker: what it reads is counted, and bounded.

A worker is not trusted. It may have 5,000 threads, wait for a million descriptors, or grow a
tree of processes; a look at it costs no more for that. What does not fit into one look is left
out, and `whole` says so: the answer is then "could not tell", never "no".

Where we may not look at a process, it is looked at as its user, if we may become that one.
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
"""Files, links and directories in one look: some 5 to 10 ms."""
MOST_BYTES = 256 << 10
"""An epoll takes about 90 bytes for each descriptor registered with it."""
MOST_NAMES = 256
"""Of one directory: threads of a process."""
EVERYTHING = 1 << 40
"""For what is done once, and not at every look."""


class TooMuch(OSError):
    """The look has cost as much as one may."""


class Files:
    """What one look may read.

    Args:
        root: where proc(5) is mounted.
        most_reads: files, links and directories.
        most_bytes: of all files together.

    Attributes:
        whole: whether nothing had to be left out so far.
        reads: how many there were.
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
        """What a process has in its memory, from `address` on, as proc_pid_mem(5) has it.

        Args:
            most_bytes: no more than this, whatever the process says.

        Raises:
            OSError, TooMuch
        """
        self._spend()
        fd = self._as_owner(path, partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            found = os.pread(fd, min(count_bytes, most_bytes), address)
        except OverflowError:  # a 32-bit process, whose calls have other numbers
            return b""
        finally:
            os.close(fd)
        self._take(len(found))
        self.whole &= len(found) < most_bytes or count_bytes <= most_bytes
        return found

    def link(self, path: str) -> str:
        """What a symbolic link says. Raises OSError, TooMuch."""
        self._spend()
        return self._as_owner(path, partial(os.readlink, path))

    def names(self, directory: str, most: int = MOST_NAMES) -> list[str]:
        """The first `most` names in a directory. Raises OSError, TooMuch."""
        self._spend()
        found = self._as_owner(directory, partial(_first_names, directory, most + 1))
        self.whole &= len(found) <= most
        return found[:most]

    def tasks(self, pid: int, most: int = MOST_NAMES) -> list[str]:
        """The directories of a process's threads, as many as are looked at; none once it is gone.

        Raises:
            PermissionError, TooMuch
        """
        try:
            names = self.names(f"{self.root}/{pid}/task", most)
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [f"{self.root}/{pid}/task/{tid}" for tid in names]

    def open_files(self, directory: str) -> Iterator[tuple[int, str]]:
        """Descriptors of a process or thread, and what each is. Raises OSError, TooMuch."""
        for fd in self.names(f"{directory}/fd", self._most_reads):
            try:
                yield int(fd), self.link(f"{directory}/fd/{fd}")
            except FileNotFoundError:  # closed since
                continue

    def _as_owner(self, path: str, act: Callable[[], T]) -> T:
        """What `act` gives, done as the owner of the process where we may not do it ourselves,
        and for all that is looked at of it from then on."""
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
        """Whether it is worth another try: a process that is not dumpable is root's here."""
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
        raise TooMuch("as much as one look may cost")


def _first_names(directory: str, most: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in islice(entries, most)]
