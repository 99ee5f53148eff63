"""The protocol of a control socket: limits, and what a valid request is.

A request and its answer are one line of JSON each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

from steer.control import peer

REQUEST_MAX_BYTES = 65536
TIMEOUT_S = 5.0
"""How long a client may take to send a whole request, and to read an answer."""
SILENT_MAX = 32
"""How many connections may have sent no request yet. Workers need the other descriptors."""
CONNECTIONS_MAX = 64
"""How many connections may be open, including clients that wait for their answers."""
BACKLOG = 16
TOO_LONG = f"request too long: {REQUEST_MAX_BYTES} bytes at most"
NOT_COMPLETE = "request not complete: a line of JSON is wanted"
NOT_UNDERSTOOD = "request not understood: an object of JSON is wanted"
Request = Mapping[str, Any]


def decode_request(line: bytes, sock: socket.socket) -> Request:
    """Decode a request.

    Args:
        line: the request as it was received.
        sock: the connection that it came over.

    Raises:
        ValueError: the user may send no requests, or the line is no request. Its text is the
            answer.
    """
    if peer.credentials(sock)[1] not in (0, os.geteuid()):
        raise ValueError("not permitted: only root and the service's own user may ask")
    try:
        request: Request = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ValueError(NOT_UNDERSTOOD) from None
    return request
