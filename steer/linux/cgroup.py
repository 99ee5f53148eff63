"""The cgroup v2 that this process is in, see cgroups(7)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from steer.errors import KernelError, in_words

_ACT = "open our cgroup"
_NOT_MOUNTED = "no cgroup v2 is mounted", "mount -t cgroup2 none /sys/fs/cgroup"


class NoCgroup(KernelError):
    """There is no cgroup v2; the cause is a whole sentence."""


@contextmanager
def own() -> Iterator[int]:
    """Open the directory of the cgroup for a moment, and yield its descriptor.

    Raises:
        KernelError: there is no cgroup, or it cannot be opened.
    """
    path = _directory()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        cause = in_words(error)
        raise KernelError.from_oserror(f"{_ACT} {path}", error, cause=cause) from None
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened(number: int) -> Iterator[int]:
    """The directory of a cgroup by its number, as a descriptor for a moment. If it cannot be seen
    from here, or was removed: the root of the mount. A program there runs for all cgroups below,
    also for those that were removed.

    Raises:
        KernelError: cgroup v2 is not mounted, or we may not open it.
    """
    mounted = _mount()
    if mounted is None:
        raise NoCgroup("open a cgroup", *_NOT_MOUNTED)
    path = f"{mounted[1]}{paths([number]).get(number, '')}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        cause = in_words(error)
        raise KernelError.from_oserror(f"open cgroup {path}", error, cause=cause) from None
    try:
        yield fd
    finally:
        os.close(fd)


def name() -> str:
    """The path of the cgroup below the root that this process sees; "" if there is none."""
    with open("/proc/self/cgroup") as file:
        for line in file:
            if line.startswith("0::"):
                return line[len("0::") :].rstrip("\n")
    return ""


def paths(numbers: Collection[int]) -> dict[int, str]:
    """The paths of these cgroups below the mount, by number. A cgroup that was removed has none.

    Args:
        numbers: the kernel's numbers, which are the inode numbers of the directories.
    """
    point = _mount()
    if point is None or not numbers:
        return {}
    found, wanted = {}, set(numbers)
    with suppress(OSError):
        if (root := os.stat(point[1]).st_ino) in wanted:
            found[root] = "/"
    below = [point[1]]
    while below and len(found) < len(wanted):
        directory = below.pop()
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                    if entry.inode() in wanted:
                        found[entry.inode()] = entry.path.removeprefix(point[1].rstrip("/"))
    return found


def _mount() -> tuple[str, str] | None:
    """The root of the mount of cgroup v2, and where it is mounted; None if it is not."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            if right.split()[0] == "cgroup2":
                _, _, _, root, point = left.split()[:5]
                return root, _unescaped(point)
    return None


def _directory() -> str:
    path = name()
    if not path:
        raise NoCgroup(_ACT, "this kernel has no cgroup v2, or it is switched off")
    mounted = _mount()
    if mounted is None:
        raise NoCgroup(_ACT, *_NOT_MOUNTED)
    root, point = mounted
    below = os.path.relpath(path, root)
    return point if below == "." else f"{point}/{below}"


def _unescaped(text: str) -> str:
    r"""Undo the escapes of proc_pid_mountinfo(5), where a space is \040."""
    if "\\" not in text:
        return text
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
