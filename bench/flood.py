"""Datagrams by the thousand to one port, from one flow or from many."""

from __future__ import annotations

import ctypes
import socket
import sys
from types import TracebackType
from typing import Self

BATCH = 1000
_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """Mirrors struct msghdr of recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """Mirrors struct mmsghdr of sendmmsg(2)."""

    _fields_ = (("header", _Header), ("sent_bytes", ctypes.c_uint))


class Flood:
    """A sender to `port` on loopback, where all of 127.0.0.0/8 is.

    Flows differ in the address they are sent to: so a batch goes through all of
    them in turn and is still one system call.

    Args:
        flows: how many, up to BATCH.
    """

    def __init__(self, port: int, flows: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._messages = (_Message * BATCH)()
        self._payload = _Iovec(b"x", 1)
        self._names = [ctypes.create_string_buffer(_sockaddr(n, port)) for n in range(flows)]
        for index, message in enumerate(self._messages):
            header, name = message.header, self._names[index % flows]
            header.name, header.name_length = ctypes.addressof(name), len(name) - 1
            header.iov, header.iov_length = ctypes.pointer(self._payload), 1

    def send(self, batches: int) -> None:
        """Raises OSError: a batch was not sent whole."""
        for _ in range(batches):
            sent = _libc.sendmmsg(self._socket.fileno(), self._messages, BATCH, 0)
            if sent != BATCH:
                raise OSError(ctypes.get_errno(), f"sendmmsg sent {sent} of {BATCH}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()


def _sockaddr(flow: int, port: int) -> bytes:
    """struct sockaddr_in of ip(7), for the flow's own address in 127.0.0.0/8."""
    family = socket.AF_INET.to_bytes(2, sys.byteorder)
    address = bytes((127, 0, 1 + flow // 250, 1 + flow % 250))
    return family + port.to_bytes(2) + address + bytes(8)
