"""Waiting until nothing waits for a worker that is no longer chosen.

What was chosen before the table changed may still be on its way into the worker's
queue, in the queue, or accepted with its request not yet read. A server that is told to
end then would drop it: uvicorn closes connections that have not asked for anything.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from steer.errors import KernelError
from steer.kernel import proc
from steer.lifecycle import Event
from steer.retry import AGAIN_S

if TYPE_CHECKING:
    from steer.fleet import Fleet
    from steer.place import Place
    from steer.spawn import Process

_TAKE_S = 0.1
"""So long a worker may take itself what waits for it, before that is moved."""
_LINGER_S = 1.0
"""So long connections just accepted may take to be answered; idle ones stay longer."""
_UNSEEN_S = 1.0
"""So long a worker may take to take what waits for it, where that cannot be seen."""
_LOOK_S = 0.01
_LOOK_AGAIN_S, _SELDOM_S = 0.1, 1.0
"""Ever more seldom, as most handshakes end soon: hundreds may take long to finish."""
_LOOK_AT_FLOWS_S = 0.25
_FLOWS_UNTIL = 0.9
"""So much of --graceful-timeout flows may go on."""


async def settle(fleet: Fleet, place: Place) -> None:
    """Report SETTLED once nothing waits for the worker; then see that it stays so. What
    fails is tried again."""
    act = f"see that nothing waits for worker {place.slot}"
    while place.process:
        try:
            await _settle(fleet, place)
        except Exception as error:  # noqa: BLE001 - or it would never be told to finish
            fleet.retry.failed(act, error)
            await asyncio.sleep(AGAIN_S)


async def _settle(fleet: Fleet, place: Place) -> None:
    """As `settle`, once.

    A handshake that began before the table changed may end now, and the connection wait at
    a listener that its worker has turned away from, but keeps open.
    """
    clock = fleet.clock
    whole_s, began_s = fleet.generation.plan.service.graceful_timeout, clock.now_s()
    await _until_forgotten(fleet, place, began_s + _FLOWS_UNTIL * whole_s)
    # Half of what is left is for finishing what it has.
    limit_s = (began_s + whole_s - clock.now_s()) / 2
    end_s = clock.now_s() + limit_s
    await until_empty(fleet, place, limit_s)
    # One that closed its listeners by itself may be finishing: a signal could cut that short.
    linger_s = limit_s if place.closed_its_listeners else _LINGER_S
    await _until_answered(fleet, place, min(end_s, clock.now_s() + linger_s))
    fleet.report(place, Event.SETTLED)
    pause_s = _LOOK_AGAIN_S
    while place.process:
        fleet.move_queue(place)
        await asyncio.sleep(pause_s)
        pause_s = min(_SELDOM_S, 1.1 * pause_s)


async def until_empty(fleet: Fleet, place: Place, limit_s: float) -> bool:
    """Until nothing waits for the worker; what can be moved is not waited for long.

    Returns:
        Whether that is so: false after `limit_s`.
    """
    fleet.settle()
    fleet.steering.settle()
    settled_s, began_s = time.monotonic(), fleet.clock.now_s()
    while place.process and not place.serves:
        with fleet.retry.spare.lent():
            queues = fleet.queues.of(place.process, settled_s)
        waited_s = fleet.clock.now_s() - began_s
        if queues is None and waited_s > _UNSEEN_S:
            return True
        if queues is not None and not any(each.queued for each in queues.values()):
            return True
        if waited_s > limit_s:
            return False
        if waited_s > _TAKE_S:
            fleet.move_queue(place)
        await asyncio.sleep(_LOOK_S)
    return True


async def _until_forgotten(fleet: Fleet, place: Place, end_s: float) -> None:
    """Until the flows that a policy remembers to be there are idle; then they are forgotten."""
    fleet.settle()
    steering, got = fleet.steering, _datagrams(fleet, place)
    if not got or place.hung or not steering.remembers():
        return
    idle_s, last_s = steering.own().params.get("idle", 0), fleet.clock.now_s()
    while place.process and (now_s := fleet.clock.now_s()) < min(end_s, last_s + idle_s):
        await asyncio.sleep(min(_LOOK_AT_FLOWS_S, end_s - now_s))
        if (now := _datagrams(fleet, place)) != got:
            got, last_s = now, now_s
    steering.let_go(place.slot)


def _datagrams(fleet: Fleet, place: Place) -> int | None:
    """Sent to it so far; None where nobody counts."""
    binds = place.generation.plan.binds
    over_udp = [at for at, bind in enumerate(binds) if bind.protocol == "udp"]
    counts = [fleet.steering.counts(place.slot, at) for at in over_udp]
    return sum(each.selected for each in counts if each) if any(counts) else None


async def _until_answered(fleet: Fleet, place: Place, end_s: float) -> None:
    while place.process and _has_connections(place, place.process) and fleet.clock.now_s() < end_s:
        await asyncio.sleep(_LOOK_S)


def _has_connections(place: Place, process: Process) -> bool:
    try:
        return bool(proc.open_sockets(process.pid) - place.others)
    except KernelError:
        return True
