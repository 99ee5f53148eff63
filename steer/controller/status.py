"""Gathers the status of a running service from its parts."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol

from steer.backends import anchors
from steer.backends.base import Backend, Counts, PolicyValues
from steer.backends.shortfalls import NO_SPARES, STILL_SELECTED
from steer.config.plan import Plan
from steer.control import schema
from steer.linux import netns
from steer.policy.builtin import KERNEL
from steer.policy.declarations import Declared
from steer.values import plural, several
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool
from steer.workers.process import WorkerProcess
from steer.workers.queues import Queues

if TYPE_CHECKING:
    from steer.workers.templates import Templates

SPARE = "spare"
"""The state of a ready spare in the status."""
_AT_ONCE = 50
"""How many workers are looked at in one turn of the loop."""


class ReportedService(Protocol):
    """What a report needs of a controller. Each value may change while a report is made."""

    @property
    def plan(self) -> Plan: ...

    @property
    def pool(self) -> WorkerPool: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def templates(self) -> Templates | None: ...

    @property
    def started_s(self) -> float: ...


async def report_of(
    service: ReportedService,
    state: str,
    loop_delay_ms: schema.LoopDelay,
    recycled: Mapping[str, int],
) -> schema.Service:
    """The status of a service now.

    Args:
        state: the state of the service as a whole: starting, running, stopping.
        loop_delay_ms: the delays of the controller, see `delays`.
        recycled: see `schema.Service`.
    """
    backend = service.backend
    workers, counted = await _workers(service.pool, backend)
    if service.backend is not backend:
        # Counters of the two backends must not be mixed.
        return await report_of(service, state, loop_delay_ms, recycled)
    plan, own = service.plan, backend.policy_values()
    return schema.Service(
        name=plan.name,
        pid=os.getpid(),
        state=state,
        generation=service.pool.generation.number,
        policy=plan.policy.name,
        policy_asked=plan.service.policy,
        policy_reason=plan.policy_reason,
        backend=backend.name,
        backend_reason=plan.backends[0].reason,
        notes=[
            *backend.notes,
            *service.pool.visibility.notes.values(),
            *_notes_on_workers(service.pool.workers, backend.name == KERNEL),
            *_notes_on_spares(service.pool.workers, plan),
            *service.pool.group_notes.values(),
            *(service.templates.notes if service.templates else ()),
            *map(str, anchors.notes(plan.binds, backend.anchors)),
        ],
        uptime_s=round(time.monotonic() - service.started_s, 3),
        binds=[schema.Address(b.protocol, b.address, b.port) for b in plan.binds],
        workers=workers,
        totals=_totals(service.pool, backend, counted),
        params=own.params,
        counters=own.counters,
        histograms=_histograms(own, plan.policy.declared),
        loop_delay_ms=loop_delay_ms,
        netns=netns.own(),
        recycled=dict(recycled),
    )


async def _workers(
    pool: WorkerPool, backend: Backend
) -> tuple[list[schema.Worker], Mapping[int, Counts]]:
    """The status of each worker, and the counters by slot."""
    queues, workers, counted = pool.queues.at_one_moment(), [], {}
    there = list(pool.workers)
    for first in range(0, len(there), _AT_ONCE):
        if first:
            await asyncio.sleep(0)
        # The lengths of queues are read through a socket or from /proc, which takes descriptors.
        with pool.retry.spare.lent():
            for worker in there[first : first + _AT_ONCE]:
                if worker not in pool.workers:
                    continue  # it has ended since
                counts = backend.counts(worker.slot)
                if counts is not None:
                    counted[worker.slot] = counts
                workers.append(_worker(worker, backend, queues, counts))
    return workers, counted


def _notes_on_workers(workers: Collection[WorkerHandle], still_selected: bool) -> list[str]:
    """Notes about workers that accept no connections.

    Args:
        still_selected: whether the backend selects such workers nevertheless.
    """
    hung = [worker.slot for worker in workers if worker.process and worker.is_hung]
    full = [worker.slot for worker in workers if worker.at_capacity]
    notes = []
    if hung and still_selected:
        notes.append(f"hung: {several('worker', hung)}; {STILL_SELECTED}")
    if full and all(worker.at_capacity for worker in workers if worker.is_in_service):
        notes.append("at capacity: every worker; connections wait until one accepts them")
    elif full:
        then = STILL_SELECTED if still_selected else "other workers get new connections"
        notes.append(f"at capacity: {several('worker', full)}; {then}")
    return notes


def _notes_on_spares(workers: Collection[WorkerHandle], plan: Plan) -> list[str]:
    """A note if there are fewer spares than are wanted."""
    wanted, here = plan.service.spares, len(plan.spare_specs)
    ready = sum(worker.is_ready_spare for worker in workers)
    if wanted and not here:
        return [NO_SPARES]
    if ready < here:
        return [f"{plural(here - ready, 'spare')} of {here} not ready to take a worker's place"]
    return []


def displayed_state(worker: WorkerHandle) -> str:
    """The state of a worker as status shows it: SPARE, or one of `State`.

    A ready worker that waits for others of its rollout is shown as starting, because it is not
    selected yet. So is a worker that waits for its first start, whose internal state is backoff. A
    worker that leaves together with others is shown as stopping, because it is not selected any
    more.
    """
    if worker.held or not worker.starts:
        return State.STARTING.value
    if worker.is_ready_spare:
        return SPARE
    return (State.STOPPING if worker.leaving else worker.state).value


def _worker(
    worker: WorkerHandle, backend: Backend, queues: Queues, counts: Counts | None
) -> schema.Worker:
    process = worker.process
    return schema.Worker(
        slot=worker.slot,
        pid=process.pid if process else None,
        state=displayed_state(worker),
        generation=worker.generation.number,
        cpus=list(worker.spec.cpus),
        weight=worker.spec.weight,
        restarts=max(0, worker.starts - 1),
        uptime_s=round(time.monotonic() - process.started_s, 3) if process else None,
        connections=schema.Connections(
            selected=counts.selected if counts else None,
            open=backend.open(worker.slot),
            migrated=counts.migrated if counts else None,
            **(_queued(process, queues) if process else {}),
        ),
        sockets=sorted(process.inodes) if process else [],
        said=worker.status_text or None,
        at_capacity=worker.at_capacity,
        left_group=_left_group(worker),
    )


def _left_group(worker: WorkerHandle) -> list[str]:
    binds = worker.generation.plan.binds
    return [f"{binds[at].label}: {each.value}" for at, each in worker.departures.items()]


def _queued(process: WorkerProcess, queues: Queues) -> Mapping[str, int]:
    """How much waits in the sockets of a process: `queued` for TCP, `queued_bytes` for UDP. A key
    is left out if there is no such socket, or if its queue cannot be read."""
    found: dict[str, int] = {}
    for at, waiting in (queues.of(process) or {}).items():
        over_tcp = process.launch.binds[at].protocol == "tcp"
        name = "queued" if over_tcp else "queued_bytes"
        found[name] = found.get(name, 0) + waiting.queued
    return found


def _histograms(own: PolicyValues, declared: Declared) -> dict[str, schema.Histogram]:
    units = {each.name: each.unit for each in declared.histograms}
    return {
        name: schema.Histogram(units[name], [(1 << n >> 1, count) for n, count in enumerate(times)])
        for name, times in own.histograms.items()
    }


def _totals(pool: WorkerPool, backend: Backend, counted: Mapping[int, Counts]) -> schema.Totals:
    """Sums of the counters of all workers, including workers that have ended.

    Args:
        counted: the counters of the workers there are, by slot.
    """
    unsteered = backend.unsteered()
    if unsteered is None:
        return schema.Totals()
    now = [counted[worker.slot] for worker in pool.workers if worker.slot in counted]
    counts = sum(now, pool.selection.retired)
    return schema.Totals(
        selected=counts.selected,
        fallback=counts.fallback + unsteered,
        unsteered=unsteered,
        migrated=counts.migrated,
    )
