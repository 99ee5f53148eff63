"""The standard streams of this process: which files they are, and whether they can be written."""

from __future__ import annotations

import contextlib
import os
import select
import stat


def file_of(number: int) -> str | None:
    """The current name of the regular file of a descriptor; None if it is not a regular file."""
    try:
        is_file = stat.S_ISREG(os.fstat(number).st_mode)
        return os.readlink(f"/proc/self/fd/{number}") if is_file else None
    except OSError:
        return None


def is_the_log(number: int) -> bool:
    """Whether a descriptor has the same file as standard error."""
    try:
        return os.path.samestat(os.fstat(number), os.fstat(2))
    except OSError:
        return False


def reopen(number: int, path: str) -> None:
    """Open a file again in place of a descriptor, after a log was rotated. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(fd, number)
    os.close(fd)


def terminal_is_gone() -> bool:
    """Whether this process has no controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return True
    return False


def stderr_takes() -> bool:
    """Whether standard error takes PIPE_BUF bytes now (poll(2), pipe(7)). A full pipe and a paused
    terminal do not, and the controller must not wait for either."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    return bool(poll.poll(0))


def write_stderr(data: bytes) -> None:
    """Write as much as possible without waiting, and drop the rest."""
    with contextlib.suppress(OSError):
        while data and stderr_takes():
            data = data[os.write(2, data[: select.PIPE_BUF]) :]
