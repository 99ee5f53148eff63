"""The shapes of what `steer inspect --json` tells. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["reuseport", "shared", "single"]


class Process(msgspec.Struct):
    """A process that has a socket open.

    Args:
        command: its name; None of one that has ended since.
        cpus: those it may run on.
        waits: how it waits for the socket: "accept", "epoll", "epoll-exclusive", "poll",
            "io_uring"; "no"; None where that cannot be seen.
    """

    pid: int
    command: str | None
    cpus: list[int]
    waits: str | None


class Socket(msgspec.Struct):
    """One socket.

    Args:
        cookie: None where nobody has asked the kernel for it yet.
        inode: as /proc/PID/fd shows it; 0 of one that belongs to no process.
        queued, backlog: TCP connections that wait, and how many more than one too few may; UDP:
            bytes that wait, and the receive buffer.
        drops: TCP connections or datagrams lost there; None where that is not told.
        accepted: TCP connections that were established there while it was counted; None where
            it was not.
        cgroup: where it was made: a path, or None where that is not known.
    """

    cookie: int | None
    inode: int
    processes: list[Process]
    queued: int
    backlog: int
    drops: int | None
    accepted: int | None = None
    cgroup: str | None = None
    is_connected: bool = False


class Program(msgspec.Struct):
    """The program that chooses in a group.

    Args:
        id, name, tag: as bpftool(8) shows them; None of a classic one.
        kind: "ebpf" or "classic".
        instructions: of a classic one.
        owner: the user who loaded it; None of a classic one.
        loaded_s: how many seconds ago.
        processes: those that have a descriptor of it.
        service: whose it is, if it is steer's.
        policy: None where the service cannot be asked.
    """

    id: int | None
    name: str | None
    owner: str | None
    kind: Literal["ebpf", "classic"]
    tag: str | None = None
    instructions: int | None = None
    loaded_s: float | None = None
    processes: list[Process] = []
    service: str | None = None
    policy: str | None = None


class Group(msgspec.Struct):
    """Sockets that share an address.

    Args:
        kind: "reuseport": each has a socket of its own; "shared": several processes wait for
            one; "single": one process does.
        user: name of `uid`, that made the sockets; None where it has none.
        netns: number of the network namespace.
        netns_name: as ip-netns(8) has it; None: it has none.
        is_elsewhere: whether that is another network namespace than the one that was looked from.
        device: index of the network interface that it is bound to; 0: to none.
        program_known: whether `program` None means that there is none.
        decides: which of them gets a connection or datagram.
        advice: what would be better, and the command for it.
        service: of steer's, whose sockets they are.
    """

    protocol: str
    address: str
    port: int
    kind: Kind
    uid: int
    user: str | None
    netns: int
    netns_name: str | None
    is_elsewhere: bool
    device: int
    program: Program | None
    program_known: bool
    sockets: list[Socket]
    decides: str = ""
    advice: list[str] = []
    service: str | None = None


class Inspection(msgspec.Struct):
    """What was seen.

    Args:
        notes: what could not be, and why.
        counted_s: for how long connections were counted; None if they were not.
    """

    schema: int
    groups: list[Group]
    notes: list[str] = []
    counted_s: float | None = None
