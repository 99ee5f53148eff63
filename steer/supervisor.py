"""Looks after a service that has been started: the loop, signals, requests, reports.

One thread, one loop; a signal handler only says which signal came.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import msgspec

from steer import report
from steer.control import Server
from steer.controller import Controller
from steer.fleet import QUICK_S, Place
from steer.kernel import process, sockets
from steer.notify import tell_supervisor


def supervise(started: Controller) -> None:
    """Until it is told to end and every worker has.

    Raises:
        AppLoadError: the application cannot be loaded.
        WorkersFailed: all workers failed before any was ready.
    """
    asyncio.run(_Supervisor(started).run())


class _Supervisor:
    def __init__(self, started: Controller) -> None:
        self._service = started
        self._plan = started.plan
        self._fleet = started.fleet
        self._steering = started.steering
        self._log = started.log
        self._state = "starting"

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_bug)
        self._fleet.watch(loop)
        self._service.listener.watch(loop, self._on_notify)
        self._watch_signals(loop)
        commands = {"status": self._on_status, "stop": self._on_stop}
        async with Server(self._service.claim.socket, commands):
            try:
                await self._fleet.up
                self._refuse_strangers()
                self._say_ready()
                await self._fleet.ended
            finally:
                await self._end_workers()

    def _refuse_strangers(self) -> None:
        """Somebody may have joined between our look at a port and our first bind there.

        Raises:
            BindError
        """
        processes = [place.process for place in self._fleet.places if place.process]
        ours = frozenset().union(*(process.inodes for process in processes))
        for bind in self._plan.binds:
            sockets.refuse_strangers(bind, ours)

    def _say_ready(self) -> None:
        if self._state == "stopping":
            return
        self._state = "running"
        self._log.info("serving %s", ", ".join(bind.label for bind in self._plan.binds))
        for line in self._plan.to_try(sys.argv[0]):
            self._log.info("try: %s", line)
        tell_supervisor(f"READY=1\nMAINPID={os.getpid()}", self._service.environment)

    # What happens.

    def _watch_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGTERM, self._stop, False)
        # Until there is a reload, what may come from a closing terminal ends gracefully.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
            loop.add_signal_handler(signal.SIGHUP, self._stop, False)
        for number in (signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, self._stop, True)
        for number in process.WITHOUT_MEANING:
            loop.add_signal_handler(number, self._log.info, "%s means nothing yet", number.name)
        process.release_signals()

    def _stop(self, quick: bool) -> None:
        """Asked a second time, quickly."""
        quick = quick or self._state == "stopping"
        self._log.info("stopping %s", "quickly" if quick else "gracefully")
        self._state = "stopping"
        tell_supervisor("STOPPING=1", self._service.environment)
        self._fleet.stop()
        self._fleet.overdue_in(QUICK_S if quick else self._plan.service.graceful_timeout)

    async def _end_workers(self) -> None:
        """However we got here, no worker is left."""
        if not self._fleet.ended.done():
            self._fleet.stop()
            self._fleet.overdue_in(QUICK_S)
            await self._fleet.ended

    def _on_notify(self, pid: int, message: Mapping[str, str]) -> None:
        if message.get("READY") == "1":
            self._fleet.notified(pid)

    def _on_bug(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something we did not think of: one line for users, all of it for debugging."""
        error = context.get("exception")
        self._log.error("bug in steer: %s: %r", context.get("message"), error)
        if error is not None:
            self._log.debug("%s", "".join(traceback.format_exception(error)))

    # Requests.

    async def _on_status(self, _request: Mapping[str, Any]) -> Mapping[str, Any]:
        self._fleet.settle()
        return {"service": msgspec.to_builtins(self._report())}

    async def _on_stop(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        self._stop(bool(request.get("quick")))
        # Shielded: others wait for it too.
        await asyncio.shield(self._fleet.ended)
        return {}

    def _report(self) -> report.Service:
        plan, now_s = self._plan, time.monotonic()
        return report.Service(
            name=plan.name,
            pid=os.getpid(),
            state=self._state,
            generation=self._service.generation,
            policy=plan.policy.name,
            backend=self._steering.backend,
            backend_reason=self._service.rung.reason,
            notes=list(self._steering.notes),
            uptime_s=round(now_s - self._service.started_s, 3),
            binds=[report.Address(b.protocol, b.address, b.port) for b in plan.binds],
            workers=[self._worker(place, now_s) for place in self._fleet.places],
            totals=self._totals(),
        )

    def _worker(self, place: Place, now_s: float) -> report.Worker:
        counts = self._steering.counts(place.slot)
        process = place.process
        return report.Worker(
            slot=place.slot,
            pid=process.pid if process else None,
            state=place.state.value,
            generation=self._service.generation,
            cpus=list(place.seat.cpus),
            weight=place.seat.weight,
            restarts=max(0, place.starts - 1),
            uptime_s=round(now_s - process.started_s, 3) if process else None,
            connections=report.Connections(
                selected=counts.selected if counts else None,
                migrated=counts.migrated if counts else None,
            ),
            sockets=sorted(process.inodes) if process else [],
        )

    def _totals(self) -> report.Totals:
        counts = self._fleet.counts()
        if counts is None:
            return report.Totals()
        unsteered = self._steering.unsteered() or 0
        return report.Totals(
            selected=counts.selected,
            fallback=counts.fallback + unsteered,
            unsteered=unsteered,
            migrated=counts.migrated,
        )
