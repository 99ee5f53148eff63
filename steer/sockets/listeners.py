"""Borrow the sockets of a worker for a moment, to look at their queues or to move them.

The controller keeps no duplicate of a worker's socket, because a duplicate would listen on, and be
selected, after the worker has died. It makes one when it needs one, and closes it at once.
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
    """Lends the sockets of one worker, whichever of its processes has them open.

    The first process of a worker may be a shell or a master process, and only a descendant of it
    may have the sockets open. Where each socket was found is remembered and tried first, so
    borrowing takes some microseconds. A search takes as much again for each open file. While the
    worker has closed one of the sockets, every call searches.

    Args:
        pid: the worker's first process.
        inodes: the inodes of its sockets, see `processes.socket_inode`.
    """

    def __init__(self, pid: int, inodes: frozenset[int]) -> None:
        self._pid = pid
        self._inodes = inodes
        self._places: dict[int, _Place] = {}

    @contextmanager
    def borrow(self) -> Iterator[dict[int, socket.socket]]:
        """Duplicates of the sockets by inode, closed on leaving; those that the worker has
        closed are left out.

        A duplicate shares its file description with the worker: do not change what the worker
        relies on, above all O_NONBLOCK (`settimeout`). Start no process meanwhile, because it
        would inherit the duplicates.

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
    """None if the socket is no longer there, or may not be borrowed."""
    try:
        fd = pidfd_getfd(place.pid, place.fd)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EBADF):
            act = f"borrow a socket of pid {place.pid}"
            refusals.append(KernelError.from_oserror(act, error, BORROW_CURES))
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

BORROW_CURES = {
    errno.EPERM: "needs ptrace(2) access: run as root with CAP_SYS_PTRACE, or as the worker's "
    "user with kernel.yama.ptrace_scope 0 (1 does for an ancestor)",
    errno.ENOSYS: f"Linux {features.BORROW.version} has it",
    errno.EMFILE: "raise the limit on open files (ulimit -n, LimitNOFILE=)",
}


# ---- what waits


class Waiting(msgspec.Struct, frozen=True):
    """What waits in a socket for its process.

    Args:
        queued: TCP: connections not yet accepted; UDP: bytes of memory that received
            datagrams take, overhead included. It falls to 0 with the last datagram, but before
            that only in steps of a quarter of the buffer (udp_rmem_release() of
            net/ipv4/udp.c).
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
    """What waits in a TCP listener or UDP socket; nothing if a TCP socket does not listen.

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
    """Whether connections wait in a listener. Datagrams cannot be moved and do not count."""
    return sock.type == socket.SOCK_STREAM and waiting(sock).queued > 0


def end(fd: int) -> None:
    """Shut a listener down, even if other processes have it open."""
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


# ---- moving a queue


def move_queue(sock: socket.socket) -> None:
    """Move the connections in a listener's accept queue to other listeners of its group. The
    listener listens on with the same backlog.

    The group must migrate, by its program or by net.ipv4.tcp_migrate_req. Otherwise, or if no
    other socket of the group listens, the kernel resets the connections.

    Before the call, remove the socket from the table and wait until running programs have ended.
    Without that, some connections that arrive at this moment are reset (2 of 26,000 in 600 moves
    on 6.18; none of 66,000 with it). After the call, put the socket into its
    REUSEPORT_SOCKARRAY again, as the kernel has removed it. A handshake that was under way
    completes at this listener and waits there: look again later.

    The worker keeps its descriptor. What it notices depends on what it does:

    - A worker that is busy, stopped, or asleep elsewhere notices nothing, now or later: no event,
      no error, no SO_ERROR. A stopped worker in accept(2), poll(2) or epoll_wait(2) waits on.
    - A worker that is awake and waits on this listener is woken. The two calls below are some
      microseconds apart. If the worker looks between them it finds EPOLLHUP, and accept(2) fails
      with EINVAL; just after them, accept(2) fails with EAGAIN or succeeds. Of 2,000 moves on
      6.18, that happened in 1,000 on the same CPU, in 0 to 4 on another CPU, and in 50 to 300
      where the scheduler placed the worker. asyncio logs the error and continues; gunicorn's sync
      worker ends. So move only the queue of a worker that does not accept, and no empty queue.

    The socket keeps its options except TCP_MAXSEG and TCP_WINDOW_CLAMP (tcp_disconnect() of
    net/ipv4/tcp.c). It must have been bound to a port: if it was bound to port 0 it gets another.

    Raises:
        OSError: it does not listen (ENOTCONN).
    """
    backlog = waiting(sock).limit
    sock.shutdown(socket.SHUT_RDWR)
    sock.listen(backlog)


def tcp_migrate_req() -> bool | None:
    """Whether the kernel moves connections from a closing listener to another listener of the group
    without a program (ip-sysctl.rst, tcp_migrate_req).

    None before Linux 5.14, which cannot migrate. Debian's 5.10.262 cannot, although it has the
    file.

    Raises:
        KernelError: the file cannot be read, for example if /proc is mounted with subset=pid.
    """
    if features.MIGRATE.is_newer_than(os.uname().release):
        return None
    path = "/proc/sys/net/ipv4/tcp_migrate_req"
    try:
        with open(path) as stream:
            return stream.read().strip() == "1"
    except OSError as error:
        cures = {errno.ENOENT: "mount /proc without subset=pid"}
        raise KernelError.from_oserror(f"read {path}", error, cures) from None
