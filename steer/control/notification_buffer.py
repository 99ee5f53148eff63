"""Notifications of workers (sd_notify(3)) as datagrams, and a buffer for them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Container, Iterator, Sequence

import msgspec

from steer.linux import family, processes

_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""
_MESSAGE_MAX_BYTES = 4096
_DATAGRAMS_MAX = 1024
_HEARTBEAT = b"WATCHDOG=1"


class Datagram(msgspec.Struct, frozen=True, array_like=True):
    """A datagram. The kernel vouches for its sender.

    Args:
        lineage: the lineage of its sender when the datagram was read, see `lineage`. Most senders
            exit soon after, or wait until it is read (sd_notify_barrier(3)).
    """

    pid: int
    uid: int
    text: bytes
    lineage: tuple[int, ...] = ()


def receive(
    sock: socket.socket, known: Container[int] = (), at_most: int = 1
) -> Iterator[Datagram]:
    """The next datagrams, if there are any. The socket has SO_PASSCRED set, and does not block.

    Descriptors that come with a datagram are closed at once. A sender of BARRIER=1 waits for that:
    it means that all datagrams before were read.

    Args:
        known: the first processes of workers.
        at_most: how many datagrams to read.
    """
    room = socket.CMSG_SPACE(_CREDENTIALS.size)
    for _ in range(at_most):
        try:
            text, ancillary, _, _ = sock.recvmsg(_MESSAGE_MAX_BYTES, room)
        except BlockingIOError:
            return
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid, uid, _ = _CREDENTIALS.unpack(value)
                yield Datagram(pid, uid, text, lineage(pid, known))


def lineage(pid: int, known: Container[int] = ()) -> tuple[int, ...]:
    """The lineage of a process, see `processes.lineage`. The last one is the worker that the
    process says it belongs to (`family.mark`).

    Args:
        known: the first processes of workers. The lineage ends at the first of these. Most messages
            are sent by such a process itself, and then nothing is read from /proc.
    """
    found = processes.lineage(pid, known)
    if any(each in known for each in found):
        return found
    said = family.mark(pid)
    return found if said is None else (*found, said)


class NotificationBuffer:
    """Reads a socket, so that its senders need not wait: ten datagrams fill a socket
    (net.unix.max_dgram_qlen), and most senders of sd_notify(3) messages block.

    Args:
        fd: the descriptor of the socket; the caller closes it.
        known: the first processes of workers.
    """

    def __init__(self, fd: int, known: Container[int] = ()) -> None:
        self._known = known
        self._socket = socket.socket(fileno=os.dup(fd))
        self._datagrams: list[Datagram] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> None:
        """Read one datagram. Heartbeats are dropped, and so are the oldest of very many."""
        received = receive(self._socket, self._known)
        self._datagrams += (one for one in received if one.text.strip() != _HEARTBEAT)
        del self._datagrams[:-_DATAGRAMS_MAX]

    def contents(self) -> bytes:
        """What was read; `decoded` reverses this."""
        return msgspec.msgpack.encode(self._datagrams)

    def close(self) -> None:
        self._socket.close()


def decoded(contents: bytes) -> Sequence[Datagram]:
    """The datagrams in the contents of a buffer; none in an empty value."""
    return msgspec.msgpack.decode(contents, type=list[Datagram]) if contents else ()
