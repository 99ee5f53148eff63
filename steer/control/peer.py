"""Connects to a control socket, and identifies the process at the other end of a connection."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""
_TIMEVAL = struct.Struct("@ll")
"""struct timeval of socket(7): seconds, microseconds."""


def connect(path: Path, timeout_s: float | None = None) -> socket.socket:
    """Connect to a control socket. Raises OSError as connect(2).

    Args:
        timeout_s: limits the connect, and each send and receive after it; None: no limit.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if timeout_s is not None:
            # Not settimeout() yet: it makes the socket non-blocking, and connect(2) would fail at
            # once if the backlog is full.
            limit = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(str(path))
        sock.settimeout(timeout_s)
    except BlockingIOError:
        sock.close()
        raise TimeoutError(errno.ETIMEDOUT, "its backlog is full") from None
    except BaseException:
        sock.close()
        raise
    return sock


def credentials(sock: socket.socket) -> tuple[int, int]:
    """The process id and user id at the other end, as the kernel reports them (unix(7),
    SO_PEERCRED)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid
