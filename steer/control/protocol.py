"""What a request on a control socket may be, and who may send one: a line of JSON each way."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

from steer.control import peer

REQUEST_MAX_BYTES = 65536
TIMEOUT_S = 5.0
"""For a request to be complete, and for an answer to be taken."""
SILENT_MAX = 32
"""So many connections may be without a request: descriptors are kept for workers."""
ASKERS_MAX = 64
"""So many connections at once, with those that wait for what they asked for."""
BACKLOG = 16
TOO_LONG = f"request too long: {REQUEST_MAX_BYTES} bytes at most"
NOT_COMPLETE = "request not complete: a line of JSON is wanted"
NOT_UNDERSTOOD = "request not understood: an object of JSON is wanted"
Request = Mapping[str, Any]


def understood(line: bytes, sock: socket.socket) -> Request:
    """What a line asks for that came over `sock`.

    Raises:
        ValueError: it says why there is nothing to answer but that.
    """
    if peer.credentials(sock)[1] not in (0, os.geteuid()):
        raise ValueError("not permitted: only root and the service's own user may ask")
    try:
        request: Request = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ValueError(NOT_UNDERSTOOD) from None
    return request
