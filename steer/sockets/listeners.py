"""The sockets of a worker, borrowed for a moment: looked at, and their queues moved.

The controller keeps no duplicate of a worker's socket, as one that is kept goes on
listening, and being chosen, after the worker has died. It takes one when it needs one, and
gives it back at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

import msgspec

from steer import features
from steer.errors import KernelError
from steer.linux import filtered, processes
from steer.linux.procfs import Files


class Borrower:
    """Lends the sockets of one worker, wherever in it they are open.

    The first process of a worker may be a shell or an arbiter, and the sockets be in use by
    one that descends from it. Where each was found is remembered and tried first: so
    borrowing takes some microseconds, and as much again for each open file when it has to
    search. It searches every time while one of the sockets is open nowhere in the worker.

    Args:
        pid: the worker's first process.
        inodes: of its sockets, see `processes.socket_inode`.
    """

    def __init__(self, pid: int, inodes: frozenset[int]) -> None:
        self._pid = pid
        self._inodes = inodes
        self._places: dict[int, _Place] = {}

    @contextmanager
    def borrow(self) -> Iterator[dict[int, socket.socket]]:
        """Duplicates of the sockets by inode, closed on leaving; those that the worker has
        closed are left out.

        A duplicate shares its file description with the worker: set nothing on it that the
        worker does not expect, O_NONBLOCK (`settimeout`) above all. Start no process
        meanwhile, which would inherit it.

        Raises:
            KernelError: refused (pidfd_getfd(2) asks for PTRACE_MODE_ATTACH_REALCREDS, see
                ptrace(2)), out of descriptors, or not known to this kernel (before 5.6).
        """
        with ExitStack() as stack:
            lent: dict[int, socket.socket] = {}
            refusals: list[KernelError] = []
            for place in chain(list(self._places.values()), self._search(refusals)):
                sock = None if place.inode in lent else _duplicate(place, refusals)
                if sock is None:
                    continue
                lent[place.inode] = stack.enter_context(sock)
                self._places[place.inode] = place
                if len(lent) == len(self._inodes):
                    break
            else:
                if refusals:
                    raise refusals[0]
            yield lent

    def _search(self, refusals: list[KernelError]) -> Iterator[_Place]:
        files = Files(most_reads=processes.MOST_OPEN)
        for pid in processes.family(self._pid, files):
            try:
                for fd, inode in processes.sockets_by_fd(pid, files=files):
                    if inode in self._inodes:
                        yield _Place(pid, fd, inode)
            except KernelError as error:
                refusals.append(error)
        if not files.whole:
            act = f"find the sockets of pid {self._pid}"
            refusals.append(
                KernelError(act, f"more than {processes.MOST_OPEN} files to look through")
            )


class _Place(msgspec.Struct, frozen=True):
    """Where a socket is open."""

    pid: int
    fd: int
    inode: int


def _duplicate(place: _Place, refusals: list[KernelError]) -> socket.socket | None:
    """None if the socket is there no more, or not for us."""
    try:
        fd = pidfd_getfd(place.pid, place.fd)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EBADF):
            act = f"borrow a socket of pid {place.pid}"
            refusals.append(KernelError.from_oserror(act, error, _CURES))
        return None
    if processes.socket_inode(fd) == place.inode:
        return socket.socket(fileno=fd)
    os.close(fd)
    return None


def pidfd_getfd(pid: int, fd: int) -> int:
    """A duplicate of another process's descriptor. Raises OSError."""
    if filtered.is_deadly(filtered.PIDFD_GETFD):
        raise OSError(errno.EPERM, "pidfd_getfd")
    pidfd = os.pidfd_open(pid)
    try:
        mine: int = _LIBC.syscall(filtered.PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if mine < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return mine


_LIBC = ctypes.CDLL(None, use_errno=True)

_CURES = {
    errno.EPERM: "needs ptrace(2) access: run as root with CAP_SYS_PTRACE, or as the worker's "
    "user with kernel.yama.ptrace_scope 0 (1 does for an ancestor)",
    errno.ENOSYS: f"Linux {features.BORROW.version} has it",
    errno.EMFILE: "raise the limit on open files (ulimit -n, LimitNOFILE=)",
}


# ---- what waits


class Waiting(msgspec.Struct, frozen=True):
    """What waits in a socket to be taken by its process.

    Args:
        queued: TCP: connections not yet accepted; UDP: bytes of memory that received
            datagrams take, overhead included. That of UDP falls to 0 with the last
            datagram, but before only by a quarter of the buffer at a time
            (udp_rmem_release() of net/ipv4/udp.c).
        limit: the backlog (TCP; one connection more is let in) or the receive buffer in
            bytes (UDP).
    """

    queued: int
    limit: int


_SO_MEMINFO = 55  # include/uapi/asm-generic/socket.h
_MEMINFO = struct.Struct("=II")  # SK_MEMINFO_RMEM_ALLOC and _RCVBUF of linux/sock_diag.h
_TCP_INFO = struct.Struct("=B23xII")  # tcpi_state, tcpi_unacked and tcpi_sacked of linux/tcp.h
_TCP_LISTEN = 10  # include/net/tcp_states.h


def waiting(sock: socket.socket) -> Waiting:
    """What waits in a TCP listener or UDP socket; in a socket that does not listen, nothing.

    Of a listener, tcpi_unacked is the accept queue and tcpi_sacked its backlog
    (tcp_get_info() of net/ipv4/tcp.c).
    """
    if sock.type == socket.SOCK_DGRAM:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        return Waiting(*_MEMINFO.unpack(raw))
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    state, queued, backlog = _TCP_INFO.unpack(raw)
    return Waiting(queued, backlog) if state == _TCP_LISTEN else Waiting(0, 0)


def is_waited_for(sock: socket.socket) -> bool:
    """Whether connections wait at it; a UDP socket's datagrams cannot be moved, so do not count."""
    return sock.type == socket.SOCK_STREAM and waiting(sock).queued > 0


def end(fd: int) -> None:
    """Have a listener listen no more, whoever has it open."""
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


# ---- moving a queue


def move_queue(sock: socket.socket) -> None:
    """Send what waits in a listener's accept queue to others of its group; it listens on, with
    the backlog it had.

    The group must migrate, by its program or net.ipv4.tcp_migrate_req, or the queue is reset;
    so it is where nobody else listens. First take the socket out of the table and let
    programs that run end: without that some connections that just then come in are reset
    (2 of 26,000 in 600 moves on 6.18; none of 66,000 with it). The kernel forgets its place
    in every REUSEPORT_SOCKARRAY: put it there again. A handshake that was half done ends at
    this listener, and then waits there: look again later.

    The owner keeps its descriptor, and its waits:

    - Busy, stopped, or asleep elsewhere: it sees nothing, now or later; no event, no error,
      no SO_ERROR. A stopped one that was in accept(2), poll(2) or epoll_wait(2) waits on.
    - Awake and waiting on this very listener: it is woken, and if it looks between the two
      calls below, some microseconds apart, it finds EPOLLHUP and accept(2) fails with
      EINVAL; just after, with EAGAIN or not at all. On 6.18, of 2,000 moves: on the same CPU
      1,000; on another one 0 to 4; where the scheduler puts it 50 to 300. asyncio logs that
      and goes on, gunicorn's sync worker ends. So move only the queue of one that takes
      nothing from it, and not an empty one.

    The socket keeps its options but TCP_MAXSEG and TCP_WINDOW_CLAMP (tcp_disconnect() of
    net/ipv4/tcp.c). It must have been bound to a port: bound to port 0 it gets another.

    Raises:
        OSError: it does not listen (ENOTCONN).
    """
    backlog = waiting(sock).limit
    sock.shutdown(socket.SHUT_RDWR)
    sock.listen(backlog)
