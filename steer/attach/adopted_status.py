"""What `steer status` shows of adopted listeners, and of the servers that opened them."""

from __future__ import annotations

import msgspec

from steer.attach import holders, status
from steer.attach.binds import listeners_at, text_of
from steer.attach.group import AttachedGroup
from steer.attach.groups import AttachedGroups
from steer.attach.roster import Member
from steer.backends.shortfalls import NO_EXCLUSION
from steer.config.plan import Plan
from steer.control import schema
from steer.linux import processes
from steer.linux.procfs import Files
from steer.linux.waiting import waits
from steer.policy.builtin import KERNEL
from steer.values import plural, several


def steered(groups: AttachedGroups, servers: schema.Service) -> schema.Service:
    """The status of a service whose listeners are selected by a policy. Raises KernelError.

    Args:
        servers: the status of the pool.
    """
    listeners = status.report_of(groups, 0.0, servers.state)
    return msgspec.structs.replace(
        listeners,
        generation=servers.generation,
        uptime_s=servers.uptime_s,
        loop_delay_ms=servers.loop_delay_ms,
        notes=[*notes(groups), *listeners.notes, *servers.notes],
        attached=False,
        servers=servers.workers,
    )


def unsteered(plan: Plan, servers: schema.Service) -> schema.Service:
    """The status of a service whose listeners are left to the kernel's hash. Raises KernelError.

    Args:
        plan: of the listeners.
    """
    return msgspec.structs.replace(
        servers,
        policy=KERNEL,
        policy_asked=plan.service.policy,
        backend=KERNEL,
        backend_reason=plan.backends[0].reason,
        binds=[schema.Address(b.protocol, b.address, b.port) for b in plan.binds],
        notes=[NO_EXCLUSION, *servers.notes],
        workers=_listeners(plan, servers),
        servers=servers.workers,
    )


def notes(groups: AttachedGroups) -> list[str]:
    """Says if fewer listeners are there than the configuration says."""
    asked = groups.plan.service.workers
    few = [each for each in groups if asked != "auto" and len(each.roster) < asked]
    return [f"{_fewer(each)} instead of {asked}, which --workers says" for each in few]


def _fewer(group: AttachedGroup) -> str:
    words = f"{plural(len(group.roster), 'listener')} of {text_of(group.bind)}"
    waiting = {pid for each in group.roster for pid in _waiting(each)}
    if len(waiting) > len(group.roster):
        words += f" (waited on by {several('pid', sorted(waiting))})"
    return words


def _waiting(member: Member) -> list[int]:
    inodes = frozenset({member.listener.inode})
    return [each.pid for each in member.holders if waits(each.pid, inodes)]


def _listeners(plan: Plan, servers: schema.Service) -> list[schema.Worker]:
    there = {inode: each for bind in plan.binds for inode, each in listeners_at(bind).items()}
    first = [each.pid for each in servers.workers if each.pid is not None]
    pids = [pid for each in first for pid in processes.family(each, Files())]
    held = holders.find(there.keys(), pids)
    return [
        schema.Worker(
            slot=number,
            pid=max((each.pid for each in held.get(inode, ())), default=None),
            state="ready",
            generation=servers.generation,
            cpus=[],
            weight=1,
            restarts=0,
            uptime_s=None,
            connections=schema.Connections(queued=there[inode].queued),
            sockets=[inode],
        )
        for number, inode in enumerate(sorted(there))
    ]
