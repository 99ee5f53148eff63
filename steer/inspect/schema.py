"""The shapes of `steer inspect --json`. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from steer.abi import ABANDONED_S

Kind = Literal["reuseport", "shared", "single", "unknown"]


class Process(msgspec.Struct):
    """A process that has a socket open.

    Args:
        command: its name; None if it has ended since.
        cpus: the CPUs that it may run on.
        waits: how it waits for the socket: "accept", "epoll", "epoll-exclusive", "poll",
            "io_uring"; "no" if it does not; None if that cannot be seen.
    """

    pid: int
    command: str | None
    cpus: list[int]
    waits: str | None


class Socket(msgspec.Struct):
    """One socket.

    Args:
        cookie: None if nobody has asked the kernel for it yet.
        inode: as /proc/PID/fd shows it; 0 if it belongs to no process.
        queued, backlog: TCP: the connections in the accept queue, and the backlog; UDP: the bytes
            in the receive queue, and the receive buffer.
        drops: connections or datagrams that the kernel dropped; None if it does not tell.
        accepted: TCP connections established while they were counted; None if they were not.
        received: UDP datagrams put into its receive queue while they were counted; None if they
            were not.
        cgroup: path of the cgroup in which it was created; None if unknown.
        is_connected: whether it is a UDP socket with a peer.
    """

    cookie: int | None
    inode: int
    processes: list[Process]
    queued: int
    backlog: int
    drops: int | None
    accepted: int | None = None
    received: int | None = None
    cgroup: str | None = None
    is_connected: bool = False


class Program(msgspec.Struct):
    """The program that selects in a group.

    Args:
        id, name, tag: as bpftool(8) shows them; None for a classic program.
        kind: "ebpf" or "classic".
        instructions: length of a classic program.
        owner: the user who loaded it; None for a classic program.
        loaded_s: seconds since it was loaded.
        processes: the processes that have a descriptor of it.
        service: the service of steer's that it belongs to.
        policy: of that service; None if it cannot be asked.
        silent_s: seconds since its attacher renewed the heartbeat; None if it is not a program of
            `steer attach`, or that cannot be read.
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
    silent_s: float | None = None

    @property
    def is_abandoned(self) -> bool:
        """Whether it leaves the selection to the kernel's hash, as its attacher is silent."""
        return self.silent_s is not None and self.silent_s > ABANDONED_S

    @property
    def is_left(self) -> bool:
        """Whether its attacher was killed, if only a moment ago."""
        return self.silent_s is not None and not self.processes


class Group(msgspec.Struct):
    """Sockets that share an address.

    Args:
        kind: "reuseport": each has a socket of its own; "shared": several processes wait for
            one; "single": one process does; "unknown": one socket, and not all processes that
            may wait for it can be seen.
        uid, user: the user who created the sockets; `user` is None if there is no such name.
        netns: inode number of the network namespace.
        netns_name: its name, see ip-netns(8); None if it has none.
        is_elsewhere: whether `steer inspect` ran in another network namespace.
        device: index of the network interface that the sockets are bound to; 0: none.
        by_cpu: number of sockets with SO_INCOMING_CPU, which the hash prefers on their CPU.
        program_known: whether programs can be seen; if not, `program` is None.
        decides: what decides which socket or process gets a connection or datagram.
        advice: what would be better, with the command for it.
        service: the service of steer's that the sockets belong to.
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
    by_cpu: int = 0
    decides: str = ""
    advice: list[str] = []
    service: str | None = None


class Inspection(msgspec.Struct):
    """What was seen.

    Args:
        notes: what could not be seen, and why.
        counted_s: how long connections and datagrams were counted; None if they were not.
    """

    schema: int
    groups: list[Group]
    notes: list[str] = []
    counted_s: float | None = None
