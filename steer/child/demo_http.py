"""The part of HTTP/1.1 that the demo needs: reads requests, makes answers. Has no sockets.

It accepts what RFC 9112 lets a client send, and refuses anything else. Lines may end in a bare line
feed, as a user of `nc` types them. Every path has the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import msgspec

_HEAD_MAX_BYTES = 64 * 1024
_DELAY_MAX_MS = 3_600_000
_BODY_MAX_BYTES = 10**15
_CHUNK_BYTES = 64 * 1024
_REASONS = {
    200: "OK",
    400: "Bad Request",
    411: "Length Required",
    431: "Request Header Fields Too Large",
}
_CONTROLS = bytes([*range(0x20), 0x7F])
_TOKEN = b"!#$%&'*+-.^_`|~" + bytes(c for c in range(0x80) if chr(c).isalnum())


class Refused(Exception):
    """A request that cannot be read. What follows it on the connection cannot be read either."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        super().__init__(why)


class Request(msgspec.Struct, frozen=True):
    """A request.

    Args:
        modern: whether it is HTTP/1.1 or later, where connections are kept by default.
    """

    method: bytes
    query: bytes
    modern: bool
    keep_alive: bool


def read_request(stream: BinaryIO) -> Request | None:
    """Read a request and skip its body; None if the stream ends first.

    Raises:
        Refused
    """
    lines = _read_head(stream)
    if not lines:
        return None
    method, target, modern = _parse_request_line(lines[0])
    fields = _parse_fields(lines[1:])
    if b"transfer-encoding" in fields:
        raise Refused(411, "a body needs Content-Length here")
    body_bytes = _whole(fields.get(b"content-length", b"0"), _BODY_MAX_BYTES)
    if body_bytes is None:
        raise Refused(400, "malformed Content-Length")
    while body_bytes:
        skipped = stream.read(min(body_bytes, _CHUNK_BYTES))
        if not skipped:
            return None
        body_bytes -= len(skipped)
    options = {option.strip() for option in fields.get(b"connection", b"").split(b",")}
    keep_alive = b"close" not in options and (modern or b"keep-alive" in options)
    return Request(method, target.partition(b"?")[2], modern, keep_alive)


def parse_delay(query: bytes) -> tuple[float, float]:
    """The seconds to sleep and to compute, from `sleep_ms` and `busy_ms` of a query.

    Raises:
        ValueError: a value is not a whole number, or is more than an hour.
    """
    wanted_ms = {b"sleep_ms": 0, b"busy_ms": 0}
    for pair in query.split(b"&"):
        name, _, value = pair.partition(b"=")
        if name in wanted_ms:
            number = _whole(value, _DELAY_MAX_MS)
            if number is None:
                raise ValueError(f"{name.decode()} must be a whole number, 0 to {_DELAY_MAX_MS}")
            wanted_ms[name] = number
    return wanted_ms[b"sleep_ms"] / 1000, wanted_ms[b"busy_ms"] / 1000


def to_json(content: Mapping[str, object]) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(content) + b"\n"


def answer(status: int, slot: int, body: bytes, option: str, *, with_body: bool = True) -> bytes:
    """The bytes of an answer.

    Args:
        option: the value of the field Connection; "": leave the field out.
    """
    connection = f"Connection: {option}\r\n" if option else ""
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nX-Steer-Slot: {slot}\r\n{connection}\r\n"
    )
    return head.encode() + (body if with_body else b"")


def _read_head(stream: BinaryIO) -> list[bytes]:
    """The lines of a request's head without line ends; empty if the stream ends first."""
    lines: list[bytes] = []
    left_bytes = _HEAD_MAX_BYTES
    while (line := stream.readline(left_bytes + 1)).endswith(b"\n") or len(line) > left_bytes:
        left_bytes -= len(line)
        if left_bytes < 0:
            raise Refused(431, f"a request's head has at most {_HEAD_MAX_BYTES} bytes")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if line:
            lines.append(line)
        elif lines:  # RFC 9112, 2.2: empty lines may come before a request
            return lines
    return []


def _parse_request_line(line: bytes) -> tuple[bytes, bytes, bool]:
    parts = line.split(b" ")
    if len(parts) == 3 and parts[2] in (b"HTTP/1.0", b"HTTP/1.1"):
        method, target, version = parts
        if _is_token(method) and target and _is_clean(target):
            return method, target, version == b"HTTP/1.1"
    raise Refused(400, "malformed request line")


def _parse_fields(lines: list[bytes]) -> dict[bytes, bytes]:
    """Header fields in lower case; repeated ones are joined by a comma (RFC 9110, 5.3)."""
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.lower().replace(b"\t", b" ").partition(b":")
        if not (colon and _is_token(name) and _is_clean(value)):
            raise Refused(400, "malformed header field")
        value = value.strip()
        fields[name] = fields[name] + b"," + value if name in fields else value
    return fields


def _is_token(text: bytes) -> bool:
    return text != b"" and not text.translate(None, _TOKEN)


def _is_clean(text: bytes) -> bool:
    return len(text.translate(None, _CONTROLS)) == len(text)


def _whole(digits: bytes, most: int) -> int | None:
    if digits.isdigit() and len(digits) <= len(str(most)) and int(digits) <= most:
        return int(digits)
    return None
