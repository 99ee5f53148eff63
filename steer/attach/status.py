"""What `steer status` shows of an attached group."""

from __future__ import annotations

import os
import time

from steer.attach import refusals
from steer.attach.group import AttachedGroup
from steer.attach.roster import Member
from steer.backends.shortfalls import NOT_COUNTED
from steer.control import schema
from steer.linux import netns
from steer.sockets.sock_diag import Listener
from steer.values import plural

SHARED = (
    "processes hold each other's listeners: what waits for one that is killed waits for its "
    "successor"
)
_OLDER = "open connections: those since `steer attach`"


def report_of(group: AttachedGroup, started_s: float, state: str) -> schema.Service:
    """The status of the group. Raises KernelError."""
    group.holders.look()
    group.check_program()
    plan, own = group.plan, group.backend.policy_values()
    there, members = group.listeners(), list(group.roster)
    units = {each.name: each.unit for each in plan.policy.declared.histograms}
    return schema.Service(
        name=plan.name,
        pid=os.getpid(),
        state=state,
        generation=1,
        policy=plan.policy.name,
        policy_asked=plan.service.policy,
        policy_reason=plan.policy_reason,
        backend=group.backend.name,
        backend_reason=plan.backends[0].reason,
        notes=_notes(group, len(there)),
        uptime_s=round(time.monotonic() - started_s, 3),
        binds=[schema.Address(b.protocol, b.address, b.port) for b in plan.binds],
        workers=[_worker(group, each, there.get(each.listener.inode)) for each in members],
        totals=_totals(group),
        params=own.params,
        counters=own.counters,
        histograms={
            name: schema.Histogram(
                units[name], [(1 << n >> 1, count) for n, count in enumerate(times)]
            )
            for name, times in own.histograms.items()
        },
        attached=True,
        netns=netns.own(),
    )


def _notes(group: AttachedGroup, listeners: int) -> list[str]:
    notes = []
    if group.counting.why_not:
        notes.append(f"{NOT_COUNTED}: {group.counting.why_not}")
    elif not group.is_older_counted:
        notes.append(_OLDER)
    if why := group.joining.why_unwatched:
        notes.append(f"listeners that close may take connections with them: {why}")
    if group.taken_by:
        notes.append(str(group.taken_by))
    if group.holders.is_held_together:
        notes.append(SHARED)
    notes += [refusals.in_words(*each) for each in group.joining.refusals.by_reason().items()]
    if group.joining.without_room:
        notes.append(refusals.full_in_words(group.roster.capacity, group.joining.without_room))
    if not group.roster.selected:
        notes.append(_unselected(listeners))
    return notes


def _unselected(listeners: int) -> str:
    if not listeners:
        return "nobody listens there: the kernel refuses connections until somebody does"
    among = plural(listeners, "listener")
    return f"no listener can be selected: the kernel alone decides among {among}"


def _worker(group: AttachedGroup, member: Member, there: Listener | None) -> schema.Worker:
    counts = group.backend.counts(member.slot)
    return schema.Worker(
        slot=member.slot,
        pid=group.holders.pid_of(member),
        state=member.state.value,
        generation=1,
        cpus=[],
        weight=group.plan.service.weight(member.slot),
        restarts=0,
        uptime_s=round(time.monotonic() - member.joined_s, 3),
        connections=schema.Connections(
            selected=counts.selected if counts else None,
            open=group.backend.open(member.slot),
            queued=there.queued if there else None,
            migrated=counts.migrated if counts else None,
        ),
        sockets=[member.listener.inode],
    )


def _totals(group: AttachedGroup) -> schema.Totals:
    now = [group.backend.counts(each.slot) for each in group.roster]
    counts = sum((each for each in now if each), group.joining.retired)
    unsteered = group.backend.unsteered() or 0
    return schema.Totals(
        selected=counts.selected,
        fallback=counts.fallback + unsteered,
        unsteered=unsteered,
        migrated=counts.migrated,
    )
