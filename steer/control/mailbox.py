"""Datagrams and who sent them: what workers tell (sd_notify(3)), kept while nobody hears it."""

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
_LETTERS_MAX = 1024
_HEARTBEAT = b"WATCHDOG=1"


class Letter(msgspec.Struct, frozen=True, array_like=True):
    """A datagram; the kernel vouches for its sender.

    Args:
        lineage: of its sender, as it was when the datagram was read: see `lineage`. Most clients
            end soon after, or wait until it is read (sd_notify_barrier(3)).
    """

    pid: int
    uid: int
    text: bytes
    lineage: tuple[int, ...] = ()


def receive(sock: socket.socket, known: Container[int] = (), at_most: int = 1) -> Iterator[Letter]:
    """The next ones, as far as there are any. The socket has SO_PASSCRED set, and does not wait.

    No descriptor is taken in. That of a BARRIER=1, by whose end the sender knows that all it sent
    before was read, is so closed at the right time.

    Args:
        known: the first processes of workers.
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
                yield Letter(pid, uid, text, lineage(pid, known))


def lineage(pid: int, known: Container[int] = ()) -> tuple[int, ...]:
    """That of `proc.lineage`, last whose it says that it is (`family.mark`).

    Args:
        known: with the first of these that is found nobody else is looked for. Most messages are
            of a worker's first process itself: of these nothing is read.
    """
    found = processes.lineage(pid, known)
    if any(each in known for each in found):
        return found
    said = family.mark(pid)
    return found if said is None else (*found, said)


class Mailbox:
    """Takes what is sent to a socket. Else who sends would soon wait: ten datagrams fill it
    (net.unix.max_dgram_qlen), and most clients of sd_notify(3) block.

    Args:
        fd: of the socket; stays the caller's.
        known: the first processes of workers.
    """

    def __init__(self, fd: int, known: Container[int] = ()) -> None:
        self._known = known
        self._socket = socket.socket(fileno=os.dup(fd))
        self._letters: list[Letter] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> None:
        """One; heartbeats are of no interest later, nor are the oldest of very many."""
        come = receive(self._socket, self._known)
        self._letters += (one for one in come if one.text.strip() != _HEARTBEAT)
        del self._letters[:-_LETTERS_MAX]

    def contents(self) -> bytes:
        """For `letters`."""
        return msgspec.msgpack.encode(self._letters)

    def close(self) -> None:
        self._socket.close()


def letters(contents: bytes) -> Sequence[Letter]:
    """What a mailbox took; of an empty value nothing."""
    return msgspec.msgpack.decode(contents, type=list[Letter]) if contents else ()
