"""The shapes of what `steer status --json` tells. Pure."""

from __future__ import annotations

import msgspec


class Connections(msgspec.Struct):
    """Of one worker. None: not counted on this backend, or not to be seen from here.

    Args:
        selected: connections (UDP: datagrams) the program sent to it.
        open: TCP connections established, and not yet closed by the worker.
        queued: TCP connections waiting in its accept queues.
        queued_bytes: UDP data waiting in its receive queues.
    """

    selected: int | None = None
    open: int | None = None
    queued: int | None = None
    queued_bytes: int | None = None
    migrated: int | None = None


class Worker(msgspec.Struct):
    """One worker. `sockets` are the inodes of its sockets; `said` is its last STATUS=;
    `at_capacity`: it takes no more connections, and gets on with those that it has; `left_group`:
    the addresses where its socket is not in the group as it was, and why."""

    slot: int
    pid: int | None
    state: str
    generation: int
    cpus: list[int]
    weight: int
    restarts: int
    uptime_s: float | None
    connections: Connections
    sockets: list[int] = []
    said: str | None = None
    at_capacity: bool = False
    left_group: list[str] = []


class Address(msgspec.Struct):
    protocol: str
    address: str
    port: int


class Totals(msgspec.Struct):
    """Of the service. `fallback` counts what did not go to the slot the policy chose;
    `unsteered` those of it that were left to the kernel's hash."""

    selected: int | None = None
    fallback: int | None = None
    unsteered: int | None = None
    migrated: int | None = None


class Histogram(msgspec.Struct):
    """Of values that a policy records.

    Args:
        unit: of the values: "us".
        buckets: pairs of the least value in it, ascending, and how many there were.
    """

    unit: str
    buckets: list[tuple[int, int]]


class LoopDelay(msgspec.Struct):
    """How long the controller's loop was busy at a time since this controller began, in
    milliseconds: so long may a request have to wait before it is read.

    Args:
        buckets: pairs of the least delay in it, ascending, and how many there were.
        p50, p99, p99_9: so large a share of them was no longer; to the end of a bucket.
    """

    buckets: list[tuple[float, int]]
    count: int
    max: float
    p50: float
    p99: float
    p99_9: float


class Service(msgspec.Struct):
    """A service that runs. `params`, `counters` and `histograms` are the policy's own, by name.

    Args:
        policy_asked: what the user named; "auto" becomes another.
        policy_reason: why `auto` became this policy; None if the user named it.
        loop_delay_ms: None from a controller that does not tell it.
    """

    name: str
    pid: int
    state: str
    generation: int
    policy: str
    backend: str
    backend_reason: str | None
    uptime_s: float
    binds: list[Address]
    workers: list[Worker]
    totals: Totals
    notes: list[str] = []
    params: dict[str, int] = {}
    counters: dict[str, int] = {}
    histograms: dict[str, Histogram] = {}
    policy_asked: str = ""
    policy_reason: str | None = None
    loop_delay_ms: LoopDelay | None = None


class Orphan(msgspec.Struct):
    """A service without a controller: its workers serve on, and nobody can tell how.

    Args:
        state: till when, and what can be done.
    """

    name: str
    state: str


class Status(msgspec.Struct):
    """What runs. `others` counts the services of other users, of which nothing more is known."""

    schema: int
    services: list[Service]
    orphaned: list[Orphan] = []
    others: int = 0
