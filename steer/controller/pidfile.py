"""The file with the controller's process id."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from steer.errors import ConfigError
from steer.linux import fork


def write_pid_file(path: str) -> Callable[[], None]:
    """Write our process id; the result removes the file if it is still ours.

    Raises:
        ConfigError: it cannot be written, or a living process is in it.
    """
    own = f"{os.getpid()}\n"
    with _writing_pid_file(path), open(path, "w") as stream:
        stream.write(own)

    def remove() -> None:
        with suppress(OSError):
            if _read(path) == own:
                os.unlink(path)

    return remove


def check_pid_file(path: str) -> None:
    """What `write_pid_file` would raise, without writing. Raises ConfigError."""
    with _writing_pid_file(path):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except FileNotFoundError:
            directory = os.path.dirname(path) or "."
            os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
            if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


@contextmanager
def _writing_pid_file(path: str) -> Iterator[None]:
    """Raises ConfigError: a living process is in it, or what is done fails."""
    act = f"write pid file {path}"
    try:
        with suppress(FileNotFoundError, ValueError):
            holder = int(_read(path))
            # In a container we may well have the number we had the last time.
            if holder != os.getpid() and fork.is_running(holder):
                raise ConfigError(act, f"it names a running process, {holder}", "stop that first")
        yield
    except OSError as error:
        raise ConfigError.from_oserror(act, error, cure="name another: --pid FILE") from None


def _read(path: str) -> str:
    with open(path) as stream:
        return stream.read()
