"""Stops a worker when its controller and the guard have both been killed.

The other end of a worker's channel is open in the controller and in the guard, and nowhere else. A
controller that adopts gets it before they close theirs. So the channel closes only when both have
been killed. Then no controller can adopt the worker, and nothing reads its standard error, so it
has to finish. The kernel sends it its stop signal (O_ASYNC and F_SETSIG of fcntl(2)). That takes
neither a thread nor any code in the worker, and survives execve(2).
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
from contextlib import suppress

from steer.errors import KernelError
from steer.linux import processes, unix
from steer.sockets.listeners import Borrower


def tie(channel: socket.socket, stop_signal: int) -> None:
    """Have the kernel send `stop_signal` to this process, once, when the other end of its channel
    closes.

    The channel has to stay open: a program that closes unknown descriptors gets no signal.
    Nothing may be sent over the channel, as that would cause the signal, too. Call this after any
    change of user: the kernel checks whether the caller may signal the process (sigio_perm() of
    fs/fcntl.c).
    """
    fd = channel.fileno()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, stop_signal)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    if has_closed(fd):  # before O_ASYNC was set
        os.kill(os.getpid(), stop_signal)


def has_told(pid: int) -> bool:
    """Whether a process was sent its stop signal because its channel closed, as far as can be seen.
    A server that gets a second signal may drop its connections."""
    with suppress(OSError, KernelError):
        inodes = {inode for _, inode in processes.sockets_by_fd(pid)} & unix.sequential()
        for inode in inodes:
            with Borrower(pid, frozenset({inode})).borrow() as lent:
                if any(_has_told(pid, sock.fileno()) for sock in lent.values()):
                    return True
    return False


def _has_told(pid: int, fd: int) -> bool:
    """Whether it was this process that got the signal: a child may have the channel open, too."""
    return fcntl.fcntl(fd, fcntl.F_GETOWN) == pid and has_closed(fd)


def has_closed(fd: int) -> bool:
    """Whether the other end of a channel has closed."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))
