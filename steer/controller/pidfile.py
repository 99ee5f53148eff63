"""The file with the controller's process id."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from steer.errors import ConfigError
from steer.linux import fork


def write_pid_file(path: str) -> Callable[[], None]:
    """Write the process id of this process.

    Returns:
        A function that removes the file, unless another process has written it since.

    Raises:
        ConfigError: the file cannot be written, or it names a running process.
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
    """See that `write_pid_file` would succeed. Raises ConfigError: it would not."""
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
    """Refuse a pid file that names a running process, and turn an OSError of the block into a
    ConfigError.

    Raises:
        ConfigError: see above.
    """
    act = f"write pid file {path}"
    try:
        with suppress(FileNotFoundError, ValueError):
            holder = int(_read(path))
            # In a container, this process may have the process id that it had the last time.
            if holder != os.getpid() and fork.is_running(holder):
                raise ConfigError(act, f"it names a running process, {holder}", "stop that first")
        yield
    except OSError as error:
        raise ConfigError.from_oserror(act, error, cure="set pid to another path") from None


def _read(path: str) -> str:
    with open(path) as stream:
        return stream.read()
