"""Network namespaces of the tests' own."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41


class Netns:
    """The network namespace a test is in: nobody else's ports, and sysctls to play with."""

    def sysctl(self, name: str, value: object) -> None:
        """Set a sysctl of this namespace: net.ipv4.tcp_syncookies."""
        Path("/proc/sys", *name.split(".")).write_text(str(value))


@contextmanager
def network_namespace() -> Iterator[Netns]:
    """Be in a new network namespace, with the loopback up.

    This process itself goes there and comes back, so a test reads as if it were alone on
    the machine: its own sockets and every process it starts are in there. setns(2) goes by
    the thread, and pytest has but one. Entering takes a millisecond, a process to send
    commands to would take 50; with the last socket and process in it the namespace is gone.
    """
    with this_network_namespace() as old:
        if _LIBC.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP_RUNNING))
            yield Netns()
        finally:
            _enter(old)


@contextmanager
def this_network_namespace() -> Iterator[int]:
    """A descriptor of the one that we are in."""
    fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def in_network_namespace(fd: int) -> Iterator[None]:
    """Be in another one. Sockets that are made there stay there."""
    with this_network_namespace() as before:
        _enter(fd)
        try:
            yield
        finally:
            _enter(before)


def _enter(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
        pytest.exit(f"setns: {os.strerror(ctypes.get_errno())}: all to come would be lost")
