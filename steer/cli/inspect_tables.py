"""What `steer inspect` shows, as rows of text. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from steer.cli.tables import Table, duration
from steer.inspect.grouping import servers
from steer.inspect.schema import Group, Inspection, Process, Program, Socket
from steer.inspect.words import pids
from steer.policy.cpus import cpu_list
from steer.values import plural

_BAR = 30
"""Characters of the longest bar."""
_OPTIONAL = ("cgroup", "cpus", "drops", "queue")
_TITLES = {
    "single": "one socket each",
    "unknown": "one socket each, which processes that cannot be seen may share",
}
"""Of the tables of the full list, by kind of group."""
_COLUMNS = ("socket", "held by", "waiting", "cpus", "queue", "drops", "cgroup")


def of_inspection(found: Inspection, in_full: bool) -> list[Table]:
    """A table for each group, and a last one for the notes.

    Args:
        in_full: whether groups of the kinds in `_TITLES` get a table each; else those of a kind
            share one.
    """
    in_brief = frozenset[str]() if in_full else _TITLES.keys()
    tables = [_group_table(each) for each in found.groups if each.kind not in in_brief]
    for kind in in_brief:
        if alone := [each for each in found.groups if each.kind == kind]:
            tables.append(_one_line_each(_TITLES[kind], alone))
    if found.notes:
        tables.append(Table("", ("notes",), [(note,) for note in found.notes]))
    return tables


def _group_table(group: Group) -> Table:
    column = "accepted" if group.protocol == "tcp" else "received"
    counts: list[int | None] = [getattr(each, column) for each in group.sockets]
    most = max((count or 0 for count in counts), default=0)
    columns = [*_COLUMNS]
    rows = [_row(each) for each in group.sockets]
    if any(count is not None for count in counts):
        columns.append(column)
        rows = [[*row, _bar(count, most)] for row, count in zip(rows, counts, strict=True)]
    return Table(_title(group), columns, rows, list(_below(group)), _OPTIONAL, None, False)


def _title(group: Group) -> str:
    parts = [_address(group), group.kind]
    if group.kind == "reuseport":
        parts.append(plural(len(group.sockets), "socket"))
    parts.append(f"user {group.user or group.uid}")
    if group.service:
        parts.append(f"service {group.service}")
    if group.device:
        parts.append(f"interface {group.device}")
    if group.is_elsewhere:
        parts.append(f"netns {_netns(group)}")
    return "  ".join(parts)


def _netns(group: Group) -> str:
    return (group.netns_name or str(group.netns)) if group.is_elsewhere else "-"


def _address(group: Group) -> str:
    host = "*" if group.address == "0.0.0.0" else group.address
    host = f"[{host}]" if ":" in host else host
    return f"{group.protocol}://{host}:{group.port}"


def _row(socket: Socket) -> list[str]:
    return [
        str(socket.inode or "-"),
        pids(socket.processes),
        _waiting(socket.processes),
        _cpus(socket.processes),
        f"{socket.queued}/{socket.backlog}",
        "-" if socket.drops is None else str(socket.drops),
        socket.cgroup or "-",
    ]


def _waiting(processes: Sequence[Process]) -> str:
    """The processes that wait, and how."""
    if not processes:
        return "-"
    if any(each.waits is None for each in processes):
        return "?"
    by_way: dict[str, list[Process]] = {}
    for each in servers(processes):
        by_way.setdefault(each.waits or "", []).append(each)
    return ", ".join(f"{pids(each)} ({way})" for way, each in by_way.items()) or "nobody"


def _cpus(processes: Sequence[Process]) -> str:
    """The CPUs of the processes that serve."""
    wanted = servers(processes) or processes
    return cpu_list(sorted({cpu for each in wanted for cpu in each.cpus}))


def _bar(count: int | None, most: int) -> str:
    if count is None:
        return "-"
    return f"{count:>{len(str(most))}} {'#' * ceil(count * _BAR / most if most else 0)}".rstrip()


def _below(group: Group) -> Iterator[str]:
    if group.program is not None:
        yield f"program: {_program(group.program)}"
    yield f"decides: {group.decides}"
    for each in group.advice:
        yield f"better: {each}"


def _program(program: Program) -> str:
    if program.kind == "classic":
        return f"classic BPF, {plural(program.instructions or 0, 'instruction')}"
    parts = [
        f"{program.id} {program.name or '(no name)'}",
        f"tag {program.tag}",
        f"loaded by {program.owner} {duration(program.loaded_s)} ago",
    ]
    if program.processes:
        parts.append(f"open in {pids(program.processes)}")
    return ", ".join(parts)


def _one_line_each(title: str, groups: Sequence[Group]) -> Table:
    """One line for each group, which has one socket."""
    columns = ["address", "user", "netns", *_COLUMNS]
    rows = [
        [_address(each), str(each.user or each.uid), _netns(each), *_row(each.sockets[0])]
        for each in groups
    ]
    return Table(title, columns, rows, (), ("netns", *_OPTIONAL, "user"), None, False)
