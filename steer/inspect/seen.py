"""A socket as it was seen, whichever way. Pure."""

from __future__ import annotations

import msgspec


class SeenProgram(msgspec.Struct, frozen=True):
    """The program of a socket's group.

    Args:
        address: in the kernel.
        instructions: of a classic one; 0 of any other.
        loaded_ns: since the boot.
    """

    address: int
    id: int
    name: str
    tag: str
    uid: int
    loaded_ns: int
    instructions: int


class Seen(msgspec.Struct, frozen=True):
    """A socket.

    Args:
        address: that it is bound to, numeric.
        group: of the kernel, by its address there; 0: none, None: not known.
        members: sockets of the group.
        kernel_address: of the socket itself; 0: not known.
        drops, cgroup: None where the kernel does not tell.
    """

    protocol: str
    address: str
    port: int
    is_v6only: bool
    device: int
    netns: int
    uid: int
    inode: int
    cookie: int
    queued: int
    backlog: int
    drops: int | None
    cgroup: int | None
    is_connected: bool
    group: int | None = None
    members: int = 0
    program: SeenProgram | None = None
    kernel_address: int = 0
