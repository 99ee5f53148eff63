"""The shapes of what steer tells: status as in the contract, and its rendering as rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import msgspec

from steer.values import plural

_BAR = 40
"""Characters of the longest bar."""


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


class Table(msgspec.Struct, frozen=True):
    """Something to print: a title, column heads, rows of text, and lines below them.

    Args:
        optional: columns that may be left out where there is no room, the first first.
        verdicts: the column that says how something is: it may be in colour.
        is_prose: whether its cells are sentences, which may be broken into lines.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()
    optional: Sequence[str] = ()
    verdicts: str | None = None
    is_prose: bool = True


GAP = "  "
"""Between columns, and between the parts of a title."""


def service_table(service: Service) -> Table:
    """A service for people: its state in the title, a row for each worker, and what is the
    policy's own."""
    binds = ", ".join(_bind(bind) for bind in service.binds)
    title = (
        f"{service.name}  {service.state}  {service.policy} on {service.backend}  {binds}  "
        f"pid {service.pid}  up {duration(service.uptime_s)}"
    )
    if service.policy_reason:
        title += f"\npolicy {became(service.policy, service.policy_reason)}"
    if service.backend_reason:
        title += f"\nnot higher up the ladder: {service.backend_reason}"
    title += "".join(f"\nnote: {note}" for note in service.notes)
    columns = (
        *("slot", "pid", "state", "gen", "cpus", "weight"),
        *("selected", "open", "queued", "restarts", "up"),
    )
    rows = [
        (
            str(worker.slot),
            _or_dash(worker.pid),
            worker.state,
            str(worker.generation),
            cpu_list(worker.cpus),
            str(worker.weight),
            _or_dash(worker.connections.selected),
            _or_dash(worker.connections.open),
            _queued(worker.connections),
            str(worker.restarts),
            duration(worker.uptime_s),
        )
        for worker in service.workers
    ]
    return Table(title, columns, rows, _own(service), _OPTIONAL, "state", False)


def became(policy: str, reason: str | None) -> str:
    """Of a policy, in words; "" if it was not `auto` that became it."""
    return f"auto is {policy}, as {reason}" if reason else ""


_OPTIONAL = ("weight", "gen", "restarts", "cpus", "up", "pid")


def tables(status: Status) -> list[Table]:
    """One for each service, and one of all that go on without a controller; below the last, how
    many there are beside."""
    found = [service_table(service) for service in status.services]
    if status.orphaned:
        found.append(orphans_table(status.orphaned))
    if found and status.others:
        below = [*found[-1].below, f"and {plural(status.others, 'service')} of other users"]
        found[-1] = msgspec.structs.replace(found[-1], below=below)
    return found


def orphans_table(orphans: Sequence[Orphan]) -> Table:
    """The services that nobody can tell more of."""
    return Table("", ("service", "state"), [(each.name, each.state) for each in orphans])


def plain(table: Table) -> str:
    """The table as aligned text."""
    lines, widths = [table.columns, *table.rows], _widths(table)
    padded = (
        GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join([*([table.title] if table.title else []), *padded, *table.below])


def plain_width(table: Table) -> int:
    """Of its rows, in characters."""
    return sum(_widths(table)) + len(GAP) * (len(table.columns) - 1)


def _widths(table: Table) -> list[int]:
    lines = [table.columns, *table.rows]
    return [max(len(line[i]) for line in lines) for i in range(len(table.columns))]


def duration(seconds: float | None) -> str:
    """Two units at most: "4.2s", "3m05s", "2h10m", "3d04h"."""
    if seconds is None:
        return "-"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // lower_size:02}{lower}"
    return f"{whole // 60}m{whole % 60:02}s"


def cpu_list(cpus: Sequence[int]) -> str:
    """As the kernel writes it: "0-3,8"."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "-"


def cpus_named(cpus: Sequence[int]) -> str:
    """With the noun: "CPU 1", "CPUs 0-3,8"."""
    return f"{'CPU' if len(cpus) == 1 else 'CPUs'} {cpu_list(cpus)}"


def _own(service: Service) -> Sequence[str]:
    """A line for the policy's parameters, one for each counter, and its histograms."""
    lines = [f"{name}: {count}" for name, count in service.counters.items()]
    if service.params:
        pairs = ", ".join(f"{name}={value}" for name, value in service.params.items())
        lines.insert(0, f"with {pairs}")
    for name, histogram in service.histograms.items():
        lines += [f"{name}, {histogram.unit}:", *_bars(histogram.buckets)]
    return lines


def _bars(buckets: Sequence[tuple[int, int]]) -> Sequence[str]:
    """From the first to the last that has anything; what it has is seen at all."""
    full = [place for place, (_, count) in enumerate(buckets) if count]
    if not full:
        return ["  nothing yet"]
    shown = buckets[full[0] : full[-1] + 1]
    most = max(count for _, count in shown)
    widths = len(str(shown[-1][0])), len(str(most))
    return [
        f"  {least:>{widths[0]}}  {count:>{widths[1]}}  {'#' * ceil(count * _BAR / most)}".rstrip()
        for least, count in shown
    ]


def _bind(bind: Address) -> str:
    host = f"[{bind.address}]" if ":" in bind.address else bind.address
    return f"{bind.protocol}://{host}:{bind.port}"


def _queued(connections: Connections) -> str:
    parts = [_or_dash(connections.queued)]
    if connections.queued_bytes is not None:
        parts.append(f"{connections.queued_bytes} B")
    return " + ".join(part for part in parts if part != "-") or "-"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
