"""The status of services as tables of text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import msgspec

from steer.control.schema import Address, Connections, Orphan, Service, Status, Worker
from steer.policy.cpus import cpu_list
from steer.values import plural

_BAR = 40
"""The length of the longest bar, in characters."""


class Table(msgspec.Struct, frozen=True):
    """A table to print: a title, column heads, rows of text, and lines below them.

    Args:
        optional: columns to leave out if there is no room, in this order.
        verdicts: the column of states or verdicts, which may be in colour.
        is_prose: whether cells are sentences, which may be broken into lines.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()
    optional: Sequence[str] = ()
    verdicts: str | None = None
    is_prose: bool = True


GAP = "  "
"""The space between columns, and between the parts of a title."""


def service_table(service: Service) -> Table:
    """The table of a service: its state in the title, a row for each worker, and below them the
    parameters, counters and histograms of its policy."""
    binds = ", ".join(_bind(bind) for bind in service.binds)
    title = (
        f"{service.name}  {service.state}  {service.policy} on {service.backend}  {binds}  "
        f"pid {service.pid}  up {duration(service.uptime_s)}"
    )
    if service.policy_reason:
        title += f"\npolicy auto is {service.policy}, as {service.policy_reason}"
    if service.backend_reason:
        title += f"\nnot on a better backend: {service.backend_reason}"
    title += "".join(f"\n{_server(each)}" for each in service.servers)
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
    return Table(title, columns, rows, _policy_lines(service), _OPTIONAL, "state", False)


def _server(server: Worker) -> str:
    """A server that opened the listeners which are the rows of the table."""
    parts = [
        f"server {server.slot}: {server.state}",
        f"pid {_or_dash(server.pid)}",
        f"generation {server.generation}",
        f"up {duration(server.uptime_s)}",
    ]
    if server.restarts:
        parts.append(plural(server.restarts, "restart"))
    return ", ".join(parts)


_OPTIONAL = ("weight", "gen", "restarts", "cpus", "up", "pid")


def of_status(status: Status) -> list[Table]:
    """A table for each service, and one for all services without a controller. A line below the
    last says how many services of other users run."""
    found = [service_table(service) for service in status.services]
    if status.orphaned:
        found.append(orphans_table(status.orphaned))
    if found and status.others:
        below = [*found[-1].below, f"and {plural(status.others, 'service')} of other users"]
        found[-1] = msgspec.structs.replace(found[-1], below=below)
    return found


def orphans_table(orphans: Sequence[Orphan]) -> Table:
    """The table of the services without a controller, of which only the state is known."""
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
    """The width of the table's rows in characters."""
    return sum(_widths(table)) + len(GAP) * (len(table.columns) - 1)


def _widths(table: Table) -> list[int]:
    lines = [table.columns, *table.rows]
    return [max(len(line[i]) for line in lines) for i in range(len(table.columns))]


def duration(seconds: float | None) -> str:
    """A duration in two units at most: "4.2s", "3m05s", "2h10m", "3d04h"."""
    if seconds is None:
        return "-"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // lower_size:02}{lower}"
    return f"{whole // 60}m{whole % 60:02}s"


def _policy_lines(service: Service) -> Sequence[str]:
    """The policy's parameters in one line, a line for each counter, and the histograms."""
    lines = [f"{name}: {count}" for name, count in service.counters.items()]
    if service.params:
        pairs = ", ".join(f"{name}={value}" for name, value in service.params.items())
        lines.insert(0, f"with {pairs}")
    for name, histogram in service.histograms.items():
        lines += [f"{name}, {histogram.unit}:", *_bars(histogram.buckets)]
    return lines


def _bars(buckets: Sequence[tuple[int, int]]) -> Sequence[str]:
    """The bars of a histogram from its first to its last bucket that is not empty. A bucket that is
    not empty has a bar of at least one character."""
    full = [index for index, (_, count) in enumerate(buckets) if count]
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
