"""Reads the heartbeat of an attacher: see struct steer_attachment of bpf/steer.h."""

from __future__ import annotations

import struct
import time

from steer.loader.foreign import ForeignProgram

_ALIVE = struct.Struct("=Q")


def silent_s(program: int) -> float | None:
    """Seconds since the attacher of a program last renewed its heartbeat.

    Args:
        program: the number of the program.

    Returns:
        None if it is not a program of `steer attach`.

    Raises:
        KernelError: it cannot be read: CAP_SYS_ADMIN is needed.
    """
    with ForeignProgram(program) as found:
        value = found.entry("steer_attachment")
    if value is None or len(value) < _ALIVE.size:
        return None
    alive_ns: int = _ALIVE.unpack_from(value)[0]
    return max(0.0, time.monotonic() - alive_ns / 1e9)
