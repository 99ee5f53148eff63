"""Finds what the import of an application left that workers cannot share: threads and sockets."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_THREADS, _DESCRIPTORS = "/proc/self/task", "/proc/self/fd"
_SHOWN = 5


def warn(channel: int) -> None:
    """Warn the user of threads and sockets, by name.

    Args:
        channel: the descriptor of our channel to the controller.
    """
    for what, names in (
        ("threads, which do not run in workers", threads()),
        ("open sockets, which all workers share", sockets(channel)),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = ", ".join(names[:_SHOWN])
            cure = "start and open such things in steer_post_fork(worker)"
            print(f"steer: import left {what}: {shown}{more}; {cure}", file=sys.stderr)


def threads() -> list[str]:
    """The names of threads beside this one: those of Python, and those of libraries that have a
    name. A thread that a library has not named is left out: OpenBLAS starts some, and ends them
    before each fork."""
    own = threading.main_thread()
    known = [each for each in threading.enumerate() if each is not own]
    ids = {str(each.native_id) for each in (own, *known)}
    return [*(each.name for each in known), *_of_libraries(ids)]


def _of_libraries(known: set[str]) -> Iterator[str]:
    main = Path(_THREADS, str(os.getpid()), "comm").read_text()
    for task in sorted(set(os.listdir(_THREADS)) - known):
        with suppress(OSError):  # it has ended
            name = Path(_THREADS, task, "comm").read_text()
            if name != main:
                yield name.strip()


def sockets(channel: int) -> list[str]:
    """The open sockets beside the channel, with their addresses."""
    found = []
    for fd in sorted(map(int, os.listdir(_DESCRIPTORS))):
        with suppress(OSError):  # the descriptor of the directory is closed by now
            is_socket = os.readlink(f"{_DESCRIPTORS}/{fd}").startswith("socket:")
            if is_socket and fd > 2 and fd != channel:
                found.append(_described(fd))
    return found


def _described(fd: int) -> str:
    with socket.socket(fileno=os.dup(fd)) as sock:
        peer = here = ""
        with suppress(OSError):  # it is not connected
            peer = _shown(sock.getpeername())
        with suppress(OSError):
            here = _shown(sock.getsockname())
    where = f"to {peer}" if peer else f"on {here}" if here else sock.family.name
    return f"{where} (descriptor {fd})"


def _shown(address: object) -> str:
    if isinstance(address, tuple):
        host, port, *_ = address
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return os.fsdecode(address) if isinstance(address, bytes) else str(address)
