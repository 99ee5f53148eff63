"""Finds what keeps a user from a file: the first directory on its path that the user may not enter.

This is tried as that user, and not computed from modes, because access control lists, security
modules and mount options also decide.
"""

from __future__ import annotations

import errno
import os
import pwd
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import msgspec

from steer.linux import fork

_LINKS_MAX = 40  # MAXSYMLINKS of include/linux/namei.h
_LINE_BYTES = 256  # BINPRM_BUF_SIZE of include/uapi/linux/binfmts.h


class Barrier(msgspec.Struct, frozen=True):
    """What a user may not do.

    Args:
        user: the name of the user.
        act: "enter" a directory, or "execute" a file.
        mode: permission bits of the path.
        is_noexec: whether its file system is mounted noexec.
    """

    user: str
    act: str
    path: str
    mode: int
    is_noexec: bool = False

    def __str__(self) -> str:
        mounted = ", mounted noexec" if self.is_noexec else ""
        return f"{self.user} may not {self.act} {self.path} (mode {self.mode:04o}{mounted})"

    @property
    def cure(self) -> str:
        if self.is_noexec:
            return "put it on a file system that is mounted without noexec"
        if self.act == "enter":
            return f"chmod o+x {self.path}, or have app and virtual environment elsewhere"
        return f"chmod a+x {self.path}"


def to_path(path: str) -> Barrier | None:
    """What keeps the user of this process from a directory or program; None if nothing does, or if
    it does not exist. A relative path starts at the current directory. Raises OSError: the current
    directory was removed."""
    if not path.startswith("/") and not os.access(".", os.X_OK):
        path = os.getcwd()
    return next((_barrier(each) for each in _way(path) if _refuses(each)), None)


def to_command(program: str, search: Sequence[str]) -> Barrier | None:
    """What keeps the user of this process from executing a program, or the interpreter that its
    first line names.

    Args:
        search: the directories of PATH.
    """
    candidates = [program] if "/" in program else [os.path.join(each, program) for each in search]
    first = None
    for path in candidates:
        barrier = to_path(path)
        if barrier is None and os.path.isfile(path):
            interpreter = _interpreter(path)
            return to_path(interpreter) if interpreter else None
        first = first or barrier
    return first


def tried(
    become: Callable[[], None], look: Callable[[], Sequence[Barrier | None]]
) -> list[Barrier | None]:
    """Call `become` and then `look` in a child process, and return what `look` found.

    Raises:
        OSError: no process can be forked, or it cannot change its user.
    """
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        try:
            pid, pidfd = fork.fork(lambda: _tell(writing, become, look))
        finally:
            os.close(writing)
        try:
            data = pipe.read()
        finally:
            fork.reap(pid, pidfd, is_child=True)
            os.close(pidfd)
    if not data:
        raise OSError(errno.EPERM, "give up privileges")
    return msgspec.json.decode(data, type=list[Barrier | None])


def _tell(
    writing: int, become: Callable[[], None], look: Callable[[], Sequence[Barrier | None]]
) -> int:
    with suppress(OSError, ValueError):  # ValueError for a null byte in a path
        become()
        os.write(writing, msgspec.json.encode(look()))
    return 0


def _way(path: str) -> Iterator[str]:
    """Each directory that a lookup passes, and at last the file; symbolic links are resolved."""
    here, names, links = "/" if path.startswith("/") else ".", deque(_names(path)), 0
    yield here
    while names:
        entry = os.path.join(here, names.popleft())
        target = _target(entry)
        if target is None:
            here = entry
        elif (links := links + 1) > _LINKS_MAX:
            return
        else:
            names.extendleft(reversed(_names(target)))
            here = "/" if target.startswith("/") else here
        yield here


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _target(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # none, or missing
        return None


def _refuses(path: str) -> bool:
    """Whether the user may not enter or execute a path; its directory may be entered."""
    return os.path.exists(path) and not os.access(path, os.X_OK)


def _barrier(path: str) -> Barrier:
    mode, is_file = os.stat(path).st_mode, os.path.isfile(path)
    shown = os.path.abspath(path).encode(errors="backslashreplace").decode()
    is_noexec = is_file and bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    return Barrier(_user(), "execute" if is_file else "enter", shown, mode & 0o7777, is_noexec)


def _user() -> str:
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _interpreter(path: str) -> str:
    """The interpreter of a script, as execve(2) finds it; "" if there is none, or no access."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LINE_BYTES)
    except OSError:
        return ""
    words = line[2:].split(maxsplit=1) if line.startswith(b"#!") else []
    return os.fsdecode(words[0]) if words else ""
