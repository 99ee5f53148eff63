"""The schema of `steer status --json`. Pure."""

from __future__ import annotations

import msgspec


class Connections(msgspec.Struct):
    """The connections of one worker. A value is None if this backend does not count it, or if steer
    cannot see it.

    Args:
        selected: connections (UDP: datagrams) that the program sent to the worker.
        open: TCP connections that are established, and that the worker has not closed.
        queued: TCP connections that wait in its accept queues.
        queued_bytes: UDP data that waits in its receive queues.
        migrated: connections that were moved to the worker from another one's accept queue.
    """

    selected: int | None = None
    open: int | None = None
    queued: int | None = None
    queued_bytes: int | None = None
    migrated: int | None = None


class Worker(msgspec.Struct):
    """One worker.

    Args:
        sockets: the inodes of its sockets.
        said: the text of its last STATUS= (sd_notify(3)).
        at_capacity: whether it accepts no more connections while it makes progress with those that
            it has.
        left_group: the addresses at which its socket has left the reuseport group, and how.
    """

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
    """Connections of the whole service.

    Args:
        fallback: connections that did not go to the slot that the policy selected.
        unsteered: the part of `fallback` that the kernel's own hash distributed.
    """

    selected: int | None = None
    fallback: int | None = None
    unsteered: int | None = None
    migrated: int | None = None


class Histogram(msgspec.Struct):
    """A histogram of values that a policy records.

    Args:
        unit: the unit of the values: "us".
        buckets: for each bucket, in ascending order: the least value in it, and the count.
    """

    unit: str
    buckets: list[tuple[int, int]]


class LoopDelay(msgspec.Struct):
    """How long the turns of the controller's event loop took, in milliseconds, since this
    controller started. A request may have to wait for one turn before it is read.

    Args:
        buckets: for each bucket, in ascending order: the least duration in it, and the count.
        count: the number of all turns.
        max: the longest turn.
        p50, p99, p99_9: percentiles, each rounded up to the end of a bucket.
    """

    buckets: list[tuple[float, int]]
    count: int
    max: float
    p50: float
    p99: float
    p99_9: float


class Service(msgspec.Struct):
    """A running service.

    Args:
        backend_reason: why no better backend is used; None: there is no better one.
        params, counters, histograms: what the policy declares, by name.
        policy_asked: the policy that the user named. If that is `auto`, `policy` is what it became.
        policy_reason: why `auto` became this policy; None: the user named the policy.
        loop_delay_ms: None: the controller is of a version that does not measure it.
        attached: whether the workers are listeners of servers that steer did not start.
        servers: the servers that steer started, if they open their listeners themselves. `workers`
            are these listeners then.
        netns: the number of the network namespace that it serves in; None: the controller is of a
            version that does not say.
        recycled: how many workers this controller has replaced because they exceeded a limit, by
            "memory" and "lifetime", or because they "asked" for it.
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
    attached: bool = False
    servers: list[Worker] = []
    netns: int | None = None
    recycled: dict[str, int] = {}


class Orphan(msgspec.Struct):
    """A service without a controller. Its workers serve on, and their status is unknown.

    Args:
        state: how long they serve on, and what the user can do.
    """

    name: str
    state: str


class Status(msgspec.Struct):
    """All running services.

    Args:
        schema: the version of this schema.
        others: how many services of other users are running.
    """

    schema: int
    services: list[Service]
    orphaned: list[Orphan] = []
    others: int = 0
