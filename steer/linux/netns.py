"""Network namespaces: their numbers and names, and being in another one for a moment."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from steer.errors import ConfigError, KernelError
from steer.values import shown

_NAMED = "/run/netns"
"""The directory where ip-netns(8) keeps named namespaces."""
_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def own() -> int:
    """The number of this thread's network namespace, as `readlink /proc/self/ns/net` shows it."""
    return os.stat(own_path()).st_ino


def own_path() -> str:
    """The file of this thread's namespace, which may differ from that of the first thread."""
    return f"/proc/self/task/{_LIBC.gettid()}/ns/net"


def names(directory: str = _NAMED) -> Mapping[int, str]:
    """The names of the namespaces that have one, by number."""
    found = {}
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                found[os.stat(entry.path).st_ino] = entry.name
    return found


def path_of(asked: str) -> str:
    """The file of a network namespace, given its name, its path, or a process that is in it.

    Raises:
        ConfigError: there is no such namespace.
    """
    act = f"find network namespace {shown(asked)}"
    if not asked:
        raise ConfigError(act, "no name", "name it, or give a path or a process id")
    if "/" in asked:
        path, cure = asked, ""
    elif asked.isascii() and asked.isdigit():
        path, cure = f"/proc/{asked}/ns/net", "there is no such process"
    else:
        path, cure = f"{_NAMED}/{asked}", "`ip netns` lists those that have a name"
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError):
            raise ConfigError(act, "no path has a null byte") from None
        cures = dict.fromkeys((errno.EACCES, errno.EPERM), _cure("CAP_SYS_PTRACE"))
        raise ConfigError.from_oserror(act, error, cures, cure=cure) from None
    return path


def enter(path: str) -> None:
    """Enter the namespace with that file for good, with this thread and those it starts.

    Raises:
        KernelError: as `entered`.
    """
    with _opened(path) as namespace:
        _enter(namespace, path)


@contextmanager
def entered(path: str) -> Iterator[None]:
    """Enter the namespace with that file, with this thread only.

    Raises:
        KernelError: this is not permitted, or the file does not belong to a network namespace.
    """
    with _opened(own_path()) as before, _opened(path) as namespace:
        _enter(namespace, path)
        try:
            yield
        finally:
            _enter(before, "where we were")


@contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        cure = _cure("CAP_SYS_PTRACE")
        raise KernelError.from_oserror(f"open {path}", error, cure=cure) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _enter(fd: int, path: str) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        error = OSError(number, os.strerror(number))
        act = f"enter network namespace {path}"
        cures = {errno.EPERM: _cure("CAP_SYS_ADMIN"), errno.EINVAL: "name a network namespace"}
        raise KernelError.from_oserror(act, error, cures)


def _cure(capability: str) -> str:
    """Root of a container lacks capabilities, and cannot become any other root."""
    needs = f"needs {capability}"
    return f"{needs}: run as root" if os.geteuid() else f"{needs}, as root has outside containers"
