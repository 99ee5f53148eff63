"""Packets as they are on the wire."""

from __future__ import annotations

import socket
import struct


def segment(source: int, port: int, flags: int) -> bytes:
    """A bare TCP header from 127.0.0.1 to itself (RFC 9293, 3.1)."""
    header = struct.pack(">HHIIBBHHH", source, port, 1000, 2000, 5 << 4, flags, 1024, 0, 0)
    address = socket.inet_aton("127.0.0.1")
    summed = struct.unpack(">16H", address * 2 + struct.pack(">HH", 6, len(header)) + header)
    total = sum(summed)
    total = (total & 0xFFFF) + (total >> 16)
    return header[:16] + struct.pack(">H", ~total & 0xFFFF) + header[18:]
