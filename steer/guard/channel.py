"""Entries and their descriptors, sent from one process to another over a unix stream."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
from collections.abc import Iterable, Sequence

import msgspec

from steer.values import plural

MAX_FDS = 253
"""The most descriptors in one message: SCM_MAX_FD of include/net/scm.h."""
SAME = -1
"""In place of a number of descriptors: the entry keeps its descriptors."""
_CHUNK_BYTES = 16384
_HEADER_BYTES = 4


FRAME_MAX_BYTES = 64 << 20
"""No frame is longer, as values have some megabytes at most."""


class NotUnderstood(OSError):
    """The received bytes are not a frame: another version of steer sent them, or they are
    damaged."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EBADMSG, why)


class Frame(msgspec.Struct, array_like=True):
    """One message.

    Args:
        act: what to do with the rest.
        fds: how many descriptors come with it; or SAME.
        group: a process group, or 0.
        wait: whether the sender waits for an answer.
        stop_signal: the signal that tells a worker to finish.
    """

    act: str
    key: str = ""
    value: bytes = b""
    fds: int = 0
    group: int = 0
    wait: bool = False
    stop_signal: int = signal.SIGTERM


_DECODER = msgspec.msgpack.Decoder(Frame)


class Channel:
    """One end of a channel.

    A frame is its length, then msgpack. Its descriptors are sent with its first bytes, at most
    MAX_FDS with each byte. One read never crosses a message that has descriptors (unix(7)), so
    descriptors arrive in the order of the frames that they belong to.

    Args:
        sock: SOCK_STREAM. Its timeout holds for each send and each receive.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Raises OSError: as sendmsg(2). Nothing can be sent afterwards."""
        self.send_all([frame], fds)

    def send_all(self, frames: Iterable[Frame], fds: Sequence[int] = ()) -> None:
        """Send several frames at once, with the descriptors of all frames in the same order.

        Raises:
            OSError: as `send`.
        """
        bodies = map(msgspec.msgpack.encode, frames)
        data = memoryview(b"".join(map(_with_length, bodies)))
        for start in range(0, len(fds), MAX_FDS):
            rights = array.array("i", fds[start : start + MAX_FDS])
            self.sock.sendmsg([data[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            data = data[1:]
        self.sock.sendall(data)

    def receive(self) -> tuple[Frame, list[int]] | None:
        """The next frame with its descriptors, or None at the end. The descriptors are
        close-on-exec, and the caller closes them.

        Raises:
            NotUnderstood: the bytes are not a frame. Nothing can be received afterwards.
            OSError: as recvmsg(2): BlockingIOError or TimeoutError where it may not block; EMFILE:
                descriptors were lost as there was no room for them.
        """
        while (frame := self._complete()) is None:
            data, fds = receive(self.sock, MAX_FDS)
            self._fds += fds
            if not data:
                return None
            self._data += data
        count = max(frame.fds, 0)
        if count > len(self._fds):
            raise NotUnderstood(f"{plural(len(self._fds), 'descriptor')}, not {count}")
        fds, self._fds = self._fds[:count], self._fds[count:]
        return frame, fds

    def _complete(self) -> Frame | None:
        end = _HEADER_BYTES + int.from_bytes(self._data[:_HEADER_BYTES], "big")
        if end > FRAME_MAX_BYTES:
            raise NotUnderstood(f"a frame of {plural(end, 'byte')}")
        if len(self._data) < max(end, _HEADER_BYTES + 1):
            return None
        with memoryview(self._data) as data, data[_HEADER_BYTES:end] as body:
            try:
                frame = _DECODER.decode(body)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                raise NotUnderstood(f"no frame: {plural(len(body), 'byte')}") from None
        del self._data[:end]
        return frame

    def close(self) -> None:
        """Close the channel, and the descriptors that no caller took."""
        self.sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _with_length(body: bytes) -> bytes:
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


def receive(sock: socket.socket, max_fds: int) -> tuple[bytes, list[int]]:
    """Receive data and descriptors; the descriptors are close-on-exec.

    socket.recv_fds() of Python 3.11 cannot do that: it ignores its flags.

    Raises:
        OSError: as recvmsg(2); EMFILE: descriptors were lost as there was no room for them.
    """
    fds = array.array("i")
    room = socket.CMSG_SPACE(max_fds * fds.itemsize)
    data, parts, flags, _ = sock.recvmsg(_CHUNK_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, part in parts:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(part[: len(part) - len(part) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return data, list(fds)
