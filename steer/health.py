"""Looks at workers from outside: whether they got ready, take what waits, came back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from steer.errors import KernelError
from steer.fleet import Fleet, Place, waits
from steer.hang import Look, Patience
from steer.kernel import listeners, proc
from steer.kernel.proc import Seen
from steer.lifecycle import Event, State

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, TimerHandle

    from steer.spawn import Process

_FIRST_S, _LAST_S = 0.01, 0.25
"""How often a worker that does not notify is looked at: often at first, then less."""
_LOOKS = 4
"""In one --hang-timeout; more while something waits."""


class Health:
    """The looks, and the clock for them.

    Args:
        fleet: is told what they show.
    """

    def __init__(self, fleet: Fleet, loop: AbstractEventLoop) -> None:
        self._fleet = fleet
        self._loop = loop
        self._starting_s = _FIRST_S
        self._starting: TimerHandle | None = None
        self._patience: dict[tuple[int, int], Patience] = {}
        self._ticking: TimerHandle | None = None
        self._may_look = True
        self.retime()

    def changed(self, place: Place) -> None:
        """A worker is in another state."""
        if place.state is State.STARTING:
            self._starting_s = _FIRST_S
        if self._starting is None and self._some_start():
            self._starting = self._loop.call_later(self._starting_s, self._look_at_starting)

    def retime(self) -> None:
        """The configuration may be another."""
        self._patience.clear()
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        self._tick_in(1.0)

    # Starting.

    def _some_start(self) -> bool:
        return any(place.state is State.STARTING for place in self._fleet.places)

    def _look_at_starting(self) -> None:
        """See which workers wait on their sockets by now."""
        self._starting = None
        for place in list(self._fleet.places):
            process = place.process if place.state is State.STARTING else None
            if process and waits(process) is Seen.YES:
                self._fleet.report(place, Event.READY)
        if self._some_start() and self._starting is None:
            self._starting_s = min(self._starting_s * 1.5, _LAST_S)
            self._starting = self._loop.call_later(self._starting_s, self._look_at_starting)

    # Hanging.

    def _tick_in(self, times: float) -> None:
        service = self._fleet.generation.plan.service
        limits_s = [each for each in (service.hang_timeout, service.watchdog) if each]
        if limits_s:
            self._ticking = self._loop.call_later(times * min(limits_s) / _LOOKS, self._tick)

    def _tick(self) -> None:
        something_waits = False
        there = {place.process.pid for place in self._fleet.places if place.process}
        self._patience = {key: each for key, each in self._patience.items() if key[0] in there}
        for place in list(self._fleet.places):
            if place.process and place.state is State.READY:
                something_waits |= self._look_at_ready(place, place.process)
            elif place.process and place.state is State.HUNG:
                self._look_at_hung(place, place.process)
        self._tick_in(0.25 if something_waits else 1.0)

    def _look_at_ready(self, place: Place, process: Process) -> bool:
        """Whether something waits for it."""
        now_s = time.monotonic()
        looks = self._looks(place, process)
        over = [self._patience_with(process, at).is_over(now_s, look) for at, look in looks.items()]
        service = place.generation.plan.service
        silent = service.watchdog is not None and now_s - place.heard_s > service.watchdog
        # Not the last: that would help nobody.
        others = any(each.serves for each in self._fleet.places if each is not place)
        if (any(over) or silent) and others and place.serves:
            why = "missed its watchdog" if silent else "takes no connections, and some wait"
            self._fleet.log.warning("worker %d hangs: it %s", place.slot, why)
            place.activity = proc.activity(process.pid)
            self._forget(process)
            self._fleet.report(place, Event.STUCK)
        return any(look.queued for look in looks.values())

    def _looks(self, place: Place, process: Process) -> dict[int, Look]:
        service = place.generation.plan.service
        if not service.hang_timeout or not self._may_look:
            return {}
        try:
            with process.sockets() as owned:
                found = {at: listeners.waiting(sock) for at, sock in owned.items()}
        except KernelError as error:
            self._may_look = False
            self._fleet.log.warning("%s; only a watchdog shows who hangs", error)
            return {}
        if not any(each.queued for each in found.values()):
            return {at: Look(0) for at in found}
        taken, activity = self._taken(place, found), proc.activity(process.pid)
        return {
            at: Look(each.queued, each.queued >= each.limit, taken, activity)
            for at, each in found.items()
        }

    def _taken(self, place: Place, found: dict[int, listeners.Waiting]) -> int | None:
        """With several binds nobody tells whose connections are taken."""
        counts = self._fleet.steering.counts(place.slot)
        binds = place.generation.plan.binds
        if counts is None or len(binds) != 1 or binds[0].protocol == "udp":
            return None
        return counts.selected - sum(each.queued for each in found.values())

    def _patience_with(self, process: Process, at: int) -> Patience:
        timeout_s = process.launch.service.hang_timeout
        return self._patience.setdefault((process.pid, at), Patience(timeout_s))

    def _forget(self, process: Process) -> None:
        for key in [key for key in self._patience if key[0] == process.pid]:
            del self._patience[key]

    def _look_at_hung(self, place: Place, process: Process) -> None:
        """Whether it is back: it did something, and waits for more."""
        self._fleet.move_queue(place)
        service = place.generation.plan.service
        if service.watchdog is not None and time.monotonic() - place.heard_s > service.watchdog:
            return
        activity = proc.activity(process.pid)
        if activity == place.activity or proc.is_stopped(process.pid):
            return
        if waits(process) is not Seen.NO:
            self._fleet.log.info("worker %d is back", place.slot)
            self._fleet.report(place, Event.BACK)
