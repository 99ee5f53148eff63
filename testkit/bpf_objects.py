"""Programs and maps that the kernel has."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

from steer.loader import libbpf

OTHER_PROGRAMS = {
    "open": {"count", "trace"},
    "attach": {"closing", "listening", "bound", "state"},
    "inspect": {
        *("tcp", "udp", "tcp_addresses", "udp_addresses"),
        *(
            "task_file",
            "holders",
            "classic",
            "mark",
            "accepted",
            "mark_udp",
            "readable",
            "received",
        ),
    },
}
"""Of the objects that are no policies, by name."""


def bpf_ids(pid: int) -> set[tuple[str, int]]:
    """The programs and maps that a process has open: ("prog", 7), ("map", 3)."""
    found = set()
    with suppress(OSError):
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(OSError):
                for line in info.read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in ("prog_id", "map_id"):
                        found.add((name.removesuffix("_id"), int(value)))
    return found


def bpf_exists(kind: str, number: int) -> bool:
    """Whether a program or map is still there; numbers are not used again for long."""
    fd: int = getattr(libbpf.libbpf(), f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    if fd >= 0:
        os.close(fd)
    return fd != -errno.ENOENT
