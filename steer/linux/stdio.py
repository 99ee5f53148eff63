"""The standard streams of this process: what they go to, and whether they take anything."""

from __future__ import annotations

import contextlib
import os
import select
import stat


def file_of(number: int) -> str | None:
    """The regular file that a descriptor is of, by the name it has now; None if it is none."""
    try:
        is_file = stat.S_ISREG(os.fstat(number).st_mode)
        return os.readlink(f"/proc/self/fd/{number}") if is_file else None
    except OSError:
        return None


def is_the_log(number: int) -> bool:
    """Whether a descriptor is of the very file that standard error goes to."""
    try:
        return os.path.samestat(os.fstat(number), os.fstat(2))
    except OSError:
        return False


def reopen(number: int, path: str) -> None:
    """Have a descriptor be of what is now there under that name: for who rotates logs. Raises
    OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(fd, number)
    os.close(fd)


def terminal_is_gone() -> bool:
    """Whether there is no terminal that controls us."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return True
    return False


def stderr_takes() -> bool:
    """Whether standard error takes PIPE_BUF bytes now (poll(2), pipe(7)). Not so a pipe that
    nobody empties or a terminal that is paused, and for neither may a controller wait."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    return bool(poll.poll(0))


def write_stderr(data: bytes) -> None:
    """Write as much as is taken without waiting; the rest is dropped."""
    with contextlib.suppress(OSError):
        while data and stderr_takes():
            data = data[os.write(2, data[: select.PIPE_BUF]) :]
