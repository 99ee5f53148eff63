"""Finds the listeners that a worker's command has opened itself, if they are to be adopted."""

from __future__ import annotations

import socket
import time

from steer.config.address import Bind
from steer.config.service import Service
from steer.errors import KernelError
from steer.linux import port_holders, processes
from steer.linux.procfs import Files
from steer.linux.waiting import Seen, waits_on
from steer.sockets import sock_diag
from steer.sockets.listeners import Waiting
from steer.sockets.sock_diag import Listener
from steer.values import plural
from steer.workers.process import WorkerProcess

_ENOUGH = 0.5
"""The share of --ready-timeout after which fewer listeners than --workers are enough."""
_NAMED_MAX = 4


def waits(process: WorkerProcess) -> Seen:
    """Whether a process of the worker waits on its listeners, and it has as many at each address of
    the service as the configuration says."""
    service = process.launch.service
    try:
        found = at_each(process)
    except KernelError:
        return Seen.UNKNOWN
    fewest = min(map(len, found.values()))
    age_s = time.monotonic() - process.started_s
    if not fewest or (fewest < wanted(service) and age_s < _ENOUGH * service.ready_timeout):
        return Seen.NO
    return waits_on(process.pid, frozenset().union(*found.values()))


def wanted(service: Service) -> int:
    """How many listeners one server is to open at each address."""
    return 1 if service.workers == "auto" else max(1, service.workers // service.instances)


def find(process: WorkerProcess) -> frozenset[int]:
    """The inodes of its listeners at the addresses of the service.

    Raises:
        KernelError: that cannot be seen.
    """
    return frozenset[int]().union(*at_each(process).values())


def at_each(process: WorkerProcess) -> dict[Bind, frozenset[int]]:
    """The same for each address."""
    there = {bind: _listeners(bind) for bind in process.launch.service.binds}
    ours = _open_sockets(process) if any(there.values()) else set()
    return {bind: inodes & ours for bind, inodes in there.items()}


def queues(process: WorkerProcess) -> dict[int, Waiting]:
    """What waits at its listeners, by inode. Raises KernelError: that cannot be seen."""
    ours = _open_sockets(process)
    found = [each for bind in process.launch.service.binds for each in _listeners_at(bind)]
    return {each.inode: each for each in found if each.inode in ours}


def _listeners(bind: Bind) -> frozenset[int]:
    return frozenset(each.inode for each in _listeners_at(bind))


def _listeners_at(bind: Bind) -> list[Listener]:
    """The TCP listeners at exactly this address. Raises KernelError."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    address = socket.inet_pton(family, bind.address.partition("%")[0])
    found = sock_diag.listeners(family, bind.port)
    return [each for each in found if each.address == address]


def _open_sockets(process: WorkerProcess) -> set[int]:
    family = processes.family(process.pid, Files())
    return {inode for member in family for _, inode in processes.sockets_by_fd(member)}


def diagnosis(process: WorkerProcess) -> tuple[str, str] | None:
    """Where a worker listens instead of at an address of the service, and what to do. None if it
    listens there or nowhere else, or if that cannot be seen."""
    try:
        found = at_each(process)
        elsewhere = _elsewhere(process, frozenset[int]().union(*found.values()))
    except (KernelError, OSError):
        return None
    missing = [_text_of(bind) for bind, inodes in found.items() if not inodes]
    if not missing or not elsewhere:
        return None
    where = " and ".join(elsewhere[:_NAMED_MAX])
    cause = f"it listens on {where}, and not on {' and '.join(missing)}"
    return cause, f"have it listen there, or give steer --bind {elsewhere[0]}"


def _elsewhere(process: WorkerProcess, known: frozenset[int]) -> list[str]:
    """Where else it listens. Raises KernelError, OSError."""
    ours = _open_sockets(process) - known
    table = port_holders.bound_sockets("tcp", f"/proc/{process.pid}") if ours else ()
    return sorted(
        {_text(each.ip, each.port) for each in table if each.waiting and each.inode in ours}
    )


def not_ready(process: WorkerProcess) -> tuple[str, str]:
    """Cause and cure if a worker has not become ready in time, and listens nowhere else."""
    try:
        found = at_each(process)
    except KernelError as error:
        return error.note.found, error.cure
    if missing := [_text_of(bind) for bind, inodes in found.items() if not inodes]:
        return f"it does not listen on {' and '.join(missing)}", "see ready_timeout"
    count = plural(sum(map(len, found.values())), "listener")
    return f"no process of it waits on its {count}", "see ready_timeout"


def _text_of(bind: Bind) -> str:
    return bind.label.removeprefix("tcp ")


def _text(ip: bytes, port: int) -> str:
    if len(ip) == 4:
        return f"{socket.inet_ntoa(ip)}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, ip)}]:{port}"
