"""Datagrams and who sent them: what workers tell (sd_notify(3)), kept while nobody hears it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence

import msgspec

from steer.kernel import family, proc

_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""
_MESSAGE_MAX_BYTES = 4096
_LETTERS_MAX = 1024
_HEARTBEAT = b"WATCHDOG=1"


class Letter(msgspec.Struct, frozen=True, array_like=True):
    """A datagram; the kernel vouches for its sender.

    Args:
        lineage: of its sender, as it was when the datagram was read: see `proc.lineage`; last
            whose it says that it is (`family.mark`). Most clients end soon after, or wait until
            it is read (sd_notify_barrier(3)).
    """

    pid: int
    uid: int
    text: bytes
    lineage: tuple[int, ...] = ()


def receive(sock: socket.socket) -> Iterator[Letter]:
    """The next one, if there is any. The socket has SO_PASSCRED set, and does not wait.

    No descriptor is taken in. That of a BARRIER=1, by whose end the sender knows that all it sent
    before was read, is so closed at the right time.
    """
    room = socket.CMSG_SPACE(_CREDENTIALS.size)
    try:
        text, ancillary, _, _ = sock.recvmsg(_MESSAGE_MAX_BYTES, room)
    except BlockingIOError:
        return
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid, uid, _ = _CREDENTIALS.unpack(value)
            yield Letter(pid, uid, text, lineage(pid))


def lineage(pid: int) -> tuple[int, ...]:
    """As `Letter` has it."""
    said = family.mark(pid)
    return proc.lineage(pid) + (() if said is None else (said,))


class Mailbox:
    """Takes what is sent to a socket. Else who sends would soon wait: ten datagrams fill it
    (net.unix.max_dgram_qlen), and most clients of sd_notify(3) block.

    Args:
        fd: of the socket; stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(fd))
        self._letters: list[Letter] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> None:
        """One; heartbeats are of no interest later, nor are the oldest of very many."""
        self._letters += (one for one in receive(self._socket) if one.text.strip() != _HEARTBEAT)
        del self._letters[:-_LETTERS_MAX]

    def contents(self) -> bytes:
        """For `letters`."""
        return msgspec.msgpack.encode(self._letters)

    def close(self) -> None:
        self._socket.close()


def letters(contents: bytes) -> Sequence[Letter]:
    """What a mailbox took; of an empty value nothing."""
    return msgspec.msgpack.decode(contents, type=list[Letter]) if contents else ()
