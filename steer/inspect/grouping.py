"""From sockets to groups, and what kind each is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from steer.inspect.schema import Kind, Process
from steer.inspect.seen import Seen


def groups(sockets: Iterable[Seen], own_netns: int) -> list[list[Seen]]:
    """Groups of sockets, those of our network namespace first, then by port.

    If the kernel's groups are unknown, sockets with the same address are a group: two sockets
    can only listen there if both have set SO_REUSEPORT.
    """
    found: dict[object, list[Seen]] = {}
    for each in sockets:
        found.setdefault(_key(each), []).append(each)
    return sorted(found.values(), key=lambda group: _order(group[0], own_netns))


def _key(seen: Seen) -> object:
    if seen.group:
        return seen.group
    if seen.group == 0:
        return (0, seen.kernel_address)
    return (seen.netns, seen.protocol, seen.address, seen.port, seen.is_v6only, seen.device)


def _order(seen: Seen, own_netns: int) -> tuple[object, ...]:
    is_wildcard = seen.address in ("0.0.0.0", "::")
    return (
        seen.netns != own_netns,
        seen.netns,
        seen.port,
        seen.protocol,
        is_wildcard,
        seen.address,
    )


def kind_of(
    group: Sequence[Seen],
    processes: Mapping[int, Sequence[Process]],
    partly_seen: Set[int] = frozenset(),
) -> Kind:
    """Whether each process has a socket of its own, or several processes wait for one.

    Args:
        processes: the processes that hold each socket, by inode.
        partly_seen: sockets that other processes may hold, too.
    """
    if len(group) > 1 or group[0].program or group[0].members > 1:
        return "reuseport"
    inode = group[0].inode
    if len(servers(processes.get(inode, ()))) > 1:
        return "shared"
    return "unknown" if inode in partly_seen else "single"


def servers(processes: Sequence[Process]) -> Sequence[Process]:
    """The processes that wait for a socket. If none is known to wait, those that may."""
    waiting = [each for each in processes if each.waits not in (None, "no")]
    return waiting or [each for each in processes if each.waits is None]
