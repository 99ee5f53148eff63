"""What `steer status` shows of an attached service."""

from __future__ import annotations

import os
import time
from collections import Counter
from functools import reduce
from operator import add

from steer.attach import refusals
from steer.attach.binds import text_of
from steer.attach.group import AttachedGroup
from steer.attach.groups import AttachedGroups
from steer.attach.roster import Member
from steer.attach.wording import Wording
from steer.backends import shortfalls
from steer.backends.shortfalls import NOT_COUNTED
from steer.control import schema
from steer.linux import netns
from steer.sockets import members
from steer.sockets.sock_diag import Listener
from steer.values import plural

SHARED = (
    "processes hold each other's listeners: what waits for one that is killed waits for its "
    "successor"
)
DATAGRAMS_LOST = "datagrams queued at a socket that closes are lost: the kernel moves none"
CONNECTED = (
    "the server has connected sockets at this address: one that it binds from now on gets all "
    "datagrams of new clients; have it bind the wildcard address"
)
_OLDER = "open connections: those since `steer attach`"


def report_of(groups: AttachedGroups, started_s: float, state: str) -> schema.Service:
    """The status of the service. Raises KernelError."""
    for each in groups:
        each.holders.look()
        each.check_program()
    plan = groups.plan
    own = reduce(add, (each.backend.policy_values() for each in groups))
    units = {each.name: each.unit for each in plan.policy.declared.histograms}
    return schema.Service(
        name=plan.name,
        pid=os.getpid(),
        state=state,
        generation=1,
        policy=plan.policy.name,
        policy_asked=plan.service.policy,
        policy_reason=plan.policy_reason,
        backend=plan.backends[0].backend,
        backend_reason=plan.backends[0].reason,
        notes=_notes(groups),
        uptime_s=round(time.monotonic() - started_s, 3),
        binds=[schema.Address(b.protocol, b.address, b.port) for b in plan.binds],
        workers=_workers(groups),
        totals=_totals(groups),
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


def _notes(groups: AttachedGroups) -> list[str]:
    """A note that is not about all groups names the address."""
    found = [(text_of(group.bind), note) for group in groups for note in _notes_of(group)]
    counts, all_groups = Counter(note for _, note in found), len(list(groups))
    of_all = [note for note, count in counts.items() if count == all_groups]
    return of_all + [f"{where}: {note}" for where, note in found if note not in of_all]


def _notes_of(group: AttachedGroup) -> list[str]:
    notes = []
    if group.counting.why_not:
        notes.append(f"{NOT_COUNTED}: {group.counting.why_not}")
    elif group.is_tcp and not group.is_older_counted:
        notes.append(_OLDER)
    if why := group.joining.why_unwatched:
        notes.append(f"sockets that close may take {group.wording.traffic} with them: {why}")
    if group.taken_by:
        notes.append(str(group.taken_by))
    if group.split:
        notes.append(str(group.split))
    if group.holders.is_held_together:
        notes.append(SHARED)
    words = group.wording
    by_reason = group.joining.refusals.by_reason()
    notes += [refusals.in_words(*each, words) for each in by_reason.items()]
    if without := group.joining.without_room:
        notes.append(refusals.full_in_words(group.roster.capacity, without, words))
    if not group.roster.selected:
        notes.append(_unselected(len(group.listeners()), words))
    if not group.is_tcp:
        notes += _of_datagrams(group)
    return notes


def _unselected(sockets: int, words: Wording) -> str:
    if not sockets:
        return f"{words.nobody} there: {words.unserved}"
    among = plural(sockets, words.socket)
    return f"no {words.socket} can be selected: the kernel alone decides among {among}"


def _of_datagrams(group: AttachedGroup) -> list[str]:
    notes = [DATAGRAMS_LOST, *shortfalls.of_load(group.plan, None)]
    (bind,) = group.plan.binds
    is_at_risk = not bind.is_wildcard and not members.connected_stay()
    if is_at_risk and members.has_connected(bind):
        notes.append(CONNECTED)
    return notes


def _workers(groups: AttachedGroups) -> list[schema.Worker]:
    there = {group.bind: group.listeners() for group in groups}
    return [
        _worker(group, each, there[group.bind].get(each.listener.inode))
        for group, each in groups.members
    ]


def _worker(group: AttachedGroup, member: Member, there: Listener | None) -> schema.Worker:
    counts = group.counts(member)
    return schema.Worker(
        slot=member.slot,
        pid=group.holders.pid_of(member),
        state=member.state.value,
        generation=1,
        cpus=[] if (cpu := group.selection.cpu_of(member.slot)) is None else [cpu],
        weight=group.plan.service.weight(member.slot),
        restarts=0,
        uptime_s=round(time.monotonic() - member.joined_s, 3),
        connections=schema.Connections(
            selected=counts.selected,
            open=group.backend.open(member.slot),
            queued=there.queued if there and group.is_tcp else None,
            queued_bytes=there.queued if there and not group.is_tcp else None,
            migrated=counts.migrated,
        ),
        sockets=[member.listener.inode],
    )


def _totals(groups: AttachedGroups) -> schema.Totals:
    now = (group.counts(each) for group, each in groups.members)
    retired = reduce(add, (each.joining.retired for each in groups))
    counts = sum(now, retired)
    unsteered = sum(each.backend.unsteered() or 0 for each in groups)
    return schema.Totals(
        selected=counts.selected,
        fallback=counts.fallback + unsteered,
        unsteered=unsteered,
        migrated=counts.migrated,
    )
