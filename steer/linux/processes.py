"""Reads about other processes from /proc: their children, arguments and sockets.

It imports little, because every start needs it. Where access may be refused, "could not look" is a
separate answer. What a worker can make large is read through `procfs.Files`, which limits how much
is read.

`root` is where proc(5) is mounted; tests pass a directory of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from contextlib import suppress

from steer.errors import KernelError
from steer.linux.procfs import EVERYTHING, Files, TooMuch


def descendants(pid: int, root: str = "/proc") -> list[int]:
    """`pid` and all its descendants, parents first; empty if there is no such process.

    A child that starts or ends meanwhile may be missed (proc(5), "children"). There is no limit, so
    use this to act on processes, and `family` to look at them periodically.
    """
    files = Files(root, most_bytes=EVERYTHING)
    found = family(pid, files, EVERYTHING)
    # Each thread has a list of children. With thousands of threads a scan of all processes is less.
    return found if files.whole else _family_by_scan(pid, root)


def may_have_children(pid: int, root: str = "/proc") -> bool:
    """Whether a process may have children. False if it has ended, or if it has a single thread
    without children. A directory has a link from each directory in it, which tells the number of
    threads."""
    try:
        is_single = os.stat(f"{root}/{pid}/task").st_nlink <= _LINKS_OF_ONE
        return not is_single or bool(read_bytes(f"{root}/{pid}/task/{pid}/children"))
    except (FileNotFoundError, ProcessLookupError):
        return os.path.exists(f"{root}/{pid}")
    except OSError:
        return True


_LINKS_OF_ONE = 3
"""The number of links to a directory with one directory in it."""
MOST_OF_FAMILY = 64


def family(pid: int, files: Files, most: int = MOST_OF_FAMILY) -> list[int]:
    """`pid` and its descendants, parents first, within the limits of `files`; see `Files.whole`.

    Args:
        most: how many processes at most, and how many threads of each.
    """
    root = files.root
    if not os.path.exists(f"{root}/{pid}"):
        return []
    if not os.path.exists(f"{root}/{pid}/task/{pid}/children"):
        return _family_by_scan(pid, root)
    found = [pid]
    with suppress(TooMuch):
        for member in found:
            found.extend(_children(member, files, most))
            if len(found) > most:
                files.whole = False
                return found[:most]
    return found


def _family_by_scan(pid: int, root: str) -> list[int]:
    """The same as `descendants`, found by the parents of all processes. This also works without
    CONFIG_PROC_CHILDREN."""
    children: dict[int | None, list[int]] = {}
    for each in all_pids(root):
        children.setdefault(parent(each, root), []).append(each)
    found = [pid]
    for member in found:
        found.extend(children.get(member, ()))
    return found


_MOST_ANCESTORS = 64


def lineage(pid: int, known: Container[int] = ()) -> tuple[int, ...]:
    """The process itself, its living ancestors, and the leaders of its process group and session.
    This works for a zombie, but not for a process that was waited for.

    Args:
        known: the search ends at the first of these.
    """
    found: dict[int, None] = {}
    walk: int | None = pid
    while walk and walk not in found and len(found) < _MOST_ANCESTORS:
        found[walk] = None
        if walk in known:
            return tuple(found)
        walk = parent(walk)
    with suppress(ProcessLookupError):
        found |= dict.fromkeys((os.getpgid(pid), os.getsid(pid)))
    return tuple(found)


def arguments(pid: int, root: str = "/proc") -> list[str]:
    """The beginning of the command line of a process; empty if there is no such process."""
    line = command_line(pid, root)
    if line is None:
        return []
    return line.decode(errors="replace").removesuffix("\0").split("\0")


def command_line(pid: int, root: str = "/proc") -> bytes | None:
    """The command line of a process as bytes, with a null byte after each argument; None if there
    is no such process. This is fast, because it is called for all processes of the machine."""
    try:
        fd = os.open(f"{root}/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, MOST_ARGUMENT_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


MOST_ARGUMENT_BYTES = 1 << 12
MOST_ENVIRONMENT_BYTES = 1 << 18


def environment(pid: int, root: str = "/proc") -> dict[str, str]:
    """The environment that a process was started with. Empty if there is no such process, if it
    may not be read, or if it is very large."""
    try:
        text = Files(root, most_bytes=MOST_ENVIRONMENT_BYTES).read(f"{root}/{pid}/environ")
    except OSError:
        return {}
    pairs = (pair.partition("=") for pair in text.decode(errors="replace").split("\0"))
    return {name: value for name, sign, value in pairs if sign}


def is_alive(pid: int, root: str = "/proc") -> bool:
    """Whether a process exists and is not a zombie."""
    stat = stat_fields(f"{root}/{pid}")
    return stat is not None and stat[0] not in (b"Z", b"X")


def children(pid: int, root: str = "/proc") -> list[int]:
    """The children of a process, including zombies."""
    if os.path.exists(f"{root}/{pid}/task/{pid}/children"):
        return _children(pid, Files(root, EVERYTHING, EVERYTHING), EVERYTHING)
    return [each for each in all_pids(root) if parent(each, root) == pid]


def only_child(pid: int, root: str = "/proc") -> int | None:
    """The child of a process that has exactly one, as wrappers have; None if it has none or more,
    or if that cannot be read. Only children of its first thread are considered."""
    try:
        found = Files(root).read(f"{root}/{pid}/task/{pid}/children").split()
    except (OSError, TooMuch):
        return None
    return int(found[0]) if len(found) == 1 else None


def start_time_ticks(pid: int, root: str = "/proc") -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process. Together
    with the pid this identifies a process, also when the pid is used again."""
    stat = stat_fields(f"{root}/{pid}")
    return int(stat[19]) if stat else None


def is_still(pid: int, began_ticks: int) -> bool:
    """Whether the process with this pid and start time is alive."""
    stat = stat_fields(f"/proc/{pid}")
    return stat is not None and stat[0] not in (b"Z", b"X") and int(stat[19]) == began_ticks


def socket_inode(fd: int) -> int:
    """The inode number by which /proc and sock_diag(7) know an open socket."""
    return os.fstat(fd).st_ino


def open_sockets(pid: int, root: str = "/proc") -> set[int]:
    """The inodes of the sockets that `pid` and its descendants have open.

    Raises:
        KernelError: one of them may not be examined, or they have too many open.
    """
    files = Files(root, MOST_OPEN)
    members = family(pid, files)
    found = {inode for member in members for _, inode in sockets_by_fd(member, root, files)}
    if not files.whole:
        raise KernelError(f"look at the open files of pid {pid}", f"more than {MOST_OPEN}")
    return found


MOST_OPEN = 2048


def sockets_by_fd(
    pid: int, root: str = "/proc", files: Files | None = None
) -> Iterator[tuple[int, int]]:
    """The descriptor and inode of each socket that a process has open, in order, within the limits
    of `files`; none if it has ended.

    Raises:
        KernelError: the process may not be examined.
    """
    directory = f"{root}/{pid}"
    files = files or Files(root, MOST_OPEN)
    try:
        for fd, target in files.open_files(directory):
            if inode := inode_of(target):
                yield fd, inode
    except PermissionError as error:
        if not is_zombie(directory):
            act, cure = f"look at the open files of pid {pid}", "run as root, or as its user"
            raise KernelError.from_oserror(act, error, cure=cure) from error
    except (FileNotFoundError, ProcessLookupError, TooMuch):
        return


def _children(pid: int, files: Files, most_threads: int) -> list[int]:
    found: list[int] = []
    with suppress(PermissionError):  # hidepid=1
        for task in files.tasks(pid, most_threads):
            with suppress(FileNotFoundError, ProcessLookupError):
                found.extend(int(child) for child in files.read(f"{task}/children").split())
    return found


def parent(pid: int, root: str = "/proc") -> int | None:
    """The parent of a process; None if there is no such process."""
    stat = stat_fields(f"{root}/{pid}")
    return int(stat[1]) if stat else None


def stat_fields(directory: str, read: Callable[[str], bytes] | None = None) -> list[bytes] | None:
    """The fields of proc_pid_stat(5) from the third, the state, on. Raises TooMuch."""
    try:
        # the second field is the command, which may hold spaces and brackets
        return (read or read_bytes)(f"{directory}/stat").rpartition(b")")[2].split()
    except TooMuch:
        raise
    except OSError:
        return None


def all_pids(root: str = "/proc") -> Iterator[int]:
    """The pids of all processes that this user can see."""
    return (int(name) for name in os.listdir(root) if name.isdigit())


def read_bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def is_zombie(task: str) -> bool:
    stat = stat_fields(task)
    return stat is not None and stat[0] in (b"Z", b"X")


def inode_of(target: str) -> int:
    """The inode of a socket from the link in /proc/PID/fd; 0 for any other file."""
    return int(target[8:-1]) if target.startswith("socket:[") else 0


def command(pid: int, root: str = "/proc") -> str | None:
    """The name of a process as in ps(1); None if there is no such process. A process can choose its
    name, so unprintable characters are removed."""
    try:
        name = read_bytes(f"{root}/{pid}/comm").decode(errors="replace")
    except OSError:
        return None
    return "".join(filter(str.isprintable, name)).strip()
