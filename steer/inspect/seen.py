"""A socket as it was seen, by whichever means. Pure."""

from __future__ import annotations

import msgspec


class SeenProgram(msgspec.Struct, frozen=True):
    """The program of a socket's group.

    Args:
        address: its address in the kernel.
        instructions: length of a classic program; 0 for eBPF.
        loaded_ns: when it was loaded, since boot.
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
        address: the numeric address that it is bound to.
        drops, cgroup: None if the kernel does not tell.
        group: the address of its group in the kernel; 0: it has none; None: unknown.
        members: number of sockets in the group.
        by_cpu: how many of them have SO_INCOMING_CPU set.
        kernel_address: the address of the socket in the kernel; 0: unknown.
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
    by_cpu: int = 0
    program: SeenProgram | None = None
    kernel_address: int = 0
