"""How a worker's processes are told to finish, by what its command has become.

A command need not start its server by name: env(1) and nice(1) execute it in their place, init
wrappers and shells start it as their child. Which it is shows once it runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from steer.config import servers
from steer.config.servers import Finish, Shown
from steer.config.service import Service
from steer.linux import processes

_MOST_WRAPPERS = 8


def how(service: Service, pid: int) -> Finish:
    """How to tell a worker to finish, by what the service says, or else by who is there now.

    Args:
        pid: of the worker's first process.
    """
    if service.stop_signal is not None or servers.known(service.command[:1]) is not None:
        return Finish(service.told_by, service.told_by)
    if not service.command:
        return servers.BY_DEFAULT
    return servers.finish(_line(pid))


def _line(pid: int) -> Iterator[Shown]:
    """The first process, then its only child, and so on."""
    member: int | None = pid
    for _ in range(_MOST_WRAPPERS):
        if member is None:
            return
        yield Shown(processes.arguments(member), processes.command(member) or "")
        member = processes.only_child(member)
