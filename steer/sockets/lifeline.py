"""How a worker learns that nobody looks after it any more: its channel closes.

The other end of a worker's channel is open in the controller, and in the guard process, and
nowhere else; who adopts has it before they let go. So it closes only when both have been
killed. Then nobody can adopt the worker, and nobody reads what it writes to standard error: it
is to finish. The kernel tells it so by the worker's own stop signal (O_ASYNC and F_SETSIG of
fcntl(2)), which takes neither a thread nor any code in the worker, and is kept over execve(2).
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
    """Have this process sent `stop_signal`, once, when the other end of its channel closes.

    It has to stay open: a program that closes what it does not know is not told. Anything that
    is sent to it would be taken for its end. To be called after any change of user: the kernel
    asks whether who called this may signal the process (sigio_perm() of fs/fcntl.c).
    """
    fd = channel.fileno()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, stop_signal)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    if has_closed(fd):  # before somebody asked to be told
        os.kill(os.getpid(), stop_signal)


def has_told(pid: int) -> bool:
    """Whether that happened to a process, as far as we may look: a server that is told once more
    may drop what it has."""
    with suppress(OSError, KernelError):
        inodes = {inode for _, inode in processes.sockets_by_fd(pid)} & unix.sequential()
        for inode in inodes:
            with Borrower(pid, frozenset({inode})).borrow() as lent:
                if any(_has_told(pid, sock.fileno()) for sock in lent.values()):
                    return True
    return False


def _has_told(pid: int, fd: int) -> bool:
    """It may be open in a child, too, and that was not told."""
    return fcntl.fcntl(fd, fcntl.F_GETOWN) == pid and has_closed(fd)


def has_closed(fd: int) -> bool:
    """Whether the other end of a channel has closed."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))
