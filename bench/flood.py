"""Packets by the thousand to one port, from one flow or from many: datagrams, or handshakes."""

from __future__ import annotations

import ctypes
import socket
import struct
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

    Flows differ in the address they come from, which IP_PKTINFO of ip(7) says: so a batch goes
    through all of them in turn and is still one system call.

    Args:
        flows: how many, up to BATCH.
    """

    def __init__(self, port: int, flows: int) -> None:
        self._socket = self._open()
        self._messages = (_Message * BATCH)()
        name = ctypes.create_string_buffer(_sockaddr(_TO, port))
        sources = [_address(flow) for flow in range(flows)]
        froms = [ctypes.create_string_buffer(_control(source)) for source in sources]
        bodies = [self._body(source, port) for source in sources]
        self._payloads = [_Iovec(body, len(body)) for body in bodies]
        self._alive = (name, froms, bodies)
        for index, message in enumerate(self._messages):
            header, flow = message.header, index % flows
            header.name, header.name_length = ctypes.addressof(name), len(name) - 1
            header.control, header.control_length = _buffer(froms[flow])
            header.iov, header.iov_length = ctypes.pointer(self._payloads[flow]), 1

    def _open(self) -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def _body(self, _source: bytes, _port: int) -> bytes:
        return b"x"

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


class Handshakes(Flood):
    """SYNs, one for each message: what asks for a connection, and never answers.

    From a raw socket (raw(7)). The SYN-ACK finds nobody, and the reset that says so takes the
    request back.
    """

    def _open(self) -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)

    def _body(self, source: bytes, port: int) -> bytes:
        """A header of RFC 9293, 3.1, with its checksum."""
        syn, window, header_words = 0x02, 65535, 5
        fields = (_FROM_PORT, port, 0, 0, header_words << 4, syn, window)
        pseudo = source + _TO + struct.pack("!HH", socket.IPPROTO_TCP, _TCP.size)
        whole = pseudo + _TCP.pack(*fields, 0, 0)
        checksum = 0xFFFF - sum(struct.unpack(f"!{len(whole) // 2}H", whole)) % 0xFFFF
        return _TCP.pack(*fields, checksum, 0)


_TCP = struct.Struct("!HHIIBBHHH")
_FROM_PORT = 40000
_TO = bytes((127, 0, 0, 1))


def _address(flow: int) -> bytes:
    """The flow's own, in 127.0.0.0/8."""
    return bytes((127, 0, 1 + flow // 250, 1 + flow % 250))


def _sockaddr(address: bytes, port: int) -> bytes:
    """struct sockaddr_in of ip(7)."""
    family = socket.AF_INET.to_bytes(2, sys.byteorder)
    return family + port.to_bytes(2) + address + bytes(8)


def _control(source: bytes) -> bytes:
    """struct cmsghdr of cmsg(3), and in_pktinfo of ip(7) with ipi_spec_dst."""
    data = struct.pack("i4s4s", 0, source, bytes(4))
    return struct.pack("@Nii", socket.CMSG_LEN(len(data)), socket.IPPROTO_IP, _IP_PKTINFO) + data


_IP_PKTINFO = 8


def _buffer(of: ctypes.Array[ctypes.c_char]) -> tuple[int, int]:
    """Where it is and how long, without the null byte that ctypes adds."""
    return ctypes.addressof(of), len(of) - 1
