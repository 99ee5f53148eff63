"""What `steer status` tells of a service that runs, gathered from its parts."""

from __future__ import annotations

import os
import time
from collections.abc import Collection

from steer import anchor, report
from steer.controller import Controller
from steer.declared import Declared
from steer.fleet import Fleet
from steer.lifecycle import State
from steer.place import Place
from steer.policy import KERNEL
from steer.steering import CHOSEN_ALL_THE_SAME, Own, Steering
from steer.values import several


def report_of(service: Controller, state: str, loop_delay_ms: report.LoopDelay) -> report.Service:
    """All that is known of it now.

    Args:
        state: of the service as a whole: starting, running, stopping.
        loop_delay_ms: of the controller, see `delays`.
    """
    plan, steering, now_s = service.plan, service.steering, time.monotonic()
    own = steering.own()
    return report.Service(
        name=plan.name,
        pid=os.getpid(),
        state=state,
        generation=service.fleet.generation.number,
        policy=plan.policy.name,
        policy_asked=plan.service.policy,
        policy_reason=plan.policy_reason,
        backend=steering.backend,
        backend_reason=service.rung.reason,
        notes=[
            *steering.notes,
            *service.fleet.visibility.notes.values(),
            *_left_out(service.fleet.places, steering.backend == KERNEL),
            *service.fleet.group_notes.values(),
            *anchor.notes(plan.binds, steering.anchors),
        ],
        uptime_s=round(now_s - service.started_s, 3),
        binds=[report.Address(b.protocol, b.address, b.port) for b in plan.binds],
        workers=[_worker(place, steering, now_s) for place in service.fleet.places],
        totals=_totals(service.fleet, steering),
        params=own.params,
        counters=own.counters,
        histograms=_histograms(own, plan.policy.declared),
        loop_delay_ms=loop_delay_ms,
    )


def _left_out(places: Collection[Place], still_chosen: bool) -> list[str]:
    """What it means for connections that there are workers that take none.

    Args:
        still_chosen: whether such a worker cannot be left out.
    """
    hung = [place.slot for place in places if place.process and place.hangs]
    full = [place.slot for place in places if place.full]
    notes = []
    if hung and still_chosen:
        notes.append(f"hung: {several('worker', hung)}; {CHOSEN_ALL_THE_SAME}")
    if full and all(place.full for place in places if place.is_in_service):
        notes.append("at capacity: every worker; connections wait until one takes them")
    elif full:
        then = CHOSEN_ALL_THE_SAME if still_chosen else "others get what comes"
        notes.append(f"at capacity: {several('worker', full)}; {then}")
    return notes


def shown(place: Place) -> State:
    """One that is ready, but comes together with others that are not, is not chosen yet; one
    that goes together with others is chosen no more. One that was never started has not failed,
    but waits for its turn."""
    if place.held or not place.starts:
        return State.STARTING
    return State.STOPPING if place.leaving else place.state


def _worker(place: Place, steering: Steering, now_s: float) -> report.Worker:
    process = place.process
    return report.Worker(
        slot=place.slot,
        pid=process.pid if process else None,
        state=shown(place).value,
        generation=place.generation.number,
        cpus=list(place.seat.cpus),
        weight=place.seat.weight,
        restarts=max(0, place.starts - 1),
        uptime_s=round(now_s - process.started_s, 3) if process else None,
        connections=_connections(steering, place.slot),
        sockets=sorted(process.inodes) if process else [],
        said=place.said or None,
        at_capacity=place.full,
        left_group=_left_group(place),
    )


def _left_group(place: Place) -> list[str]:
    binds = place.generation.plan.binds
    return [f"{binds[at].label}: {each.value}" for at, each in place.left.items()]


def _connections(steering: Steering, slot: int) -> report.Connections:
    counts = steering.counts(slot)
    return report.Connections(
        selected=counts.selected if counts else None,
        open=steering.open(slot),
        migrated=counts.migrated if counts else None,
    )


def _histograms(own: Own, declared: Declared) -> dict[str, report.Histogram]:
    units = {each.name: each.unit for each in declared.histograms}
    return {
        name: report.Histogram(units[name], [(1 << n >> 1, count) for n, count in enumerate(times)])
        for name, times in own.histograms.items()
    }


def _totals(fleet: Fleet, steering: Steering) -> report.Totals:
    counts = fleet.counts()
    if counts is None:
        return report.Totals()
    unsteered = steering.unsteered() or 0
    return report.Totals(
        selected=counts.selected,
        fallback=counts.fallback + unsteered,
        unsteered=unsteered,
        migrated=counts.migrated,
    )
