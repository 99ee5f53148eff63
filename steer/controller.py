"""The controller: one parent process that steers, and never touches a connection.

It carries out a plan step by step, waits, and undoes what it did in reverse. One
thread, one loop; a signal handler only says which signal came.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from logging import Logger
from pathlib import Path
from typing import Any

import msgspec

from steer import ladder, report
from steer.control import Server
from steer.errors import ConfigError, KernelError
from steer.fleet import QUICK_S, Fleet, Place
from steer.kernel import process, rundir, sockets
from steer.notify import Listener, tell_supervisor
from steer.plan import Act, Plan, Seat, Step
from steer.steering import Steering, open_backend
from steer.worker import Launch


def run(plan: Plan, environment: Mapping[str, str], log: Logger) -> int:
    """Run a service until it is told to end.

    Returns:
        The exit status.

    Raises:
        SteerError: it could not be started.
    """
    return asyncio.run(Controller(plan, environment, log).run())


class Controller:
    """One service from start to end."""

    def __init__(self, plan: Plan, environment: Mapping[str, str], log: Logger) -> None:
        self._plan = plan
        self._environment = environment
        self._log = log
        self._generation = 1
        self._started_s = time.monotonic()
        self._state = "starting"
        self._reason: str | None = None
        self._steering: Steering | None = None
        self._fleet: Fleet | None = None
        self._claim: rundir.Claim
        self._undo = AsyncExitStack()

    async def run(self) -> int:
        self._identity = process.identity(self._plan.service.user, self._plan.service.group)
        self._files = process.allow_descriptors(self._plan.descriptors)
        self._watch_signals()
        async with self._undo:
            for step in self._plan.steps():
                if self._state != "stopping":
                    await _CARRY_OUT[step.act](self, step)
            if self._fleet is not None:
                await self._fleet.ended.wait()
            self._log.info("ended")
        return 0

    # The steps of the plan.

    async def _claim_name(self, _step: Step) -> None:
        service = self._plan.service
        self._claim = rundir.Claim(self._plan.name, service.control_socket, self._environment)
        self._undo.callback(self._claim.release)
        if self._claim.refusals:
            places = "; ".join(self._claim.refusals)
            self._log.info("control socket %s, as not at %s", self._claim.path, places)
        commands = {"status": self._on_status, "stop": self._on_stop}
        await self._undo.enter_async_context(Server(self._claim.socket, commands))
        if service.pid:
            self._undo.callback(_write_pid(Path(service.pid)))

    async def _check_free(self, step: Step) -> None:
        for bind in self._plan.binds:
            if bind.label == step.object:
                sockets.check_free(bind)

    async def _load(self, _step: Step) -> None:
        """The first rung that holds; each that does not leaves its reason with the next."""
        failed: list[tuple[str, KernelError]] = []
        for rung in self._plan.rungs:
            for backend, error in failed:
                rung = ladder.after(rung, backend, str(error))
            ladder.choose(rung, self._plan.service.strict)
            try:
                self._steering = open_backend(rung.backend, self._plan)
            except KernelError as error:
                failed.append((rung.backend, error))
                if error.detail:
                    self._log.warning("%s\n%s", error, error.detail)
                continue
            self._undo.callback(self._steering.close)
            self._reason = rung.reason
            return

    async def _start_workers(self, _step: Step) -> None:
        assert self._steering is not None
        listener = Listener(self._on_notify)
        self._undo.callback(listener.close)
        self._notify = listener.address
        plan = self._plan
        self._fleet = Fleet(plan.seats, plan.slots, self._steering, self._launch, self._log)
        self._undo.push_async_callback(self._end_workers)
        self._announce()
        await self._fleet.start(self._claim.others_may_start)

    async def _say_ready(self, step: Step) -> None:
        if self._state == "starting":
            self._state = "running"
            self._log.info("serving %s", step.object)
            for line in self._plan.to_try(sys.argv[0]):
                self._log.info("try: %s", line)
            tell_supervisor(f"READY=1\nMAINPID={os.getpid()}", self._environment)

    def _announce(self) -> None:
        assert self._steering is not None
        plan = self._plan
        self._log.info(
            "%s: %d workers, %s on %s",
            plan.name,
            len(plan.seats),
            plan.policy.name,
            self._steering.backend,
        )
        if self._reason:
            self._log.warning("not higher up the ladder: %s", self._reason)
            self._log.info("ebpf would add: %s", ladder.EBPF_ADDS)

    def _launch(self, seat: Seat, slot: int) -> Launch:
        return Launch(
            self._plan.service,
            self._plan.name,
            self._plan.binds,
            seat,
            slot,
            self._generation,
            self._identity,
            self._notify,
            self._files,
            os.getpid(),
        )

    # What happens.

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_bug)
        loop.add_signal_handler(signal.SIGTERM, self._stop, False)
        # Until there is a reload, what may come from a closing terminal ends gracefully.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
            loop.add_signal_handler(signal.SIGHUP, self._stop, False)
        for number in (signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, self._stop, True)
        for number in process.WITHOUT_MEANING:
            loop.add_signal_handler(number, self._log.info, "%s means nothing yet", number.name)

    def _stop(self, quick: bool) -> None:
        """Asked a second time, quickly."""
        quick = quick or self._state == "stopping"
        self._log.info("stopping %s", "quickly" if quick else "gracefully")
        self._state = "stopping"
        tell_supervisor("STOPPING=1", self._environment)
        if self._fleet is not None:
            self._fleet.stop()
            self._fleet.overdue_in(QUICK_S if quick else self._plan.service.graceful_timeout)

    async def _end_workers(self) -> None:
        """However we got here, no worker is left."""
        assert self._fleet is not None
        if not self._fleet.ended.is_set():
            self._fleet.stop()
            self._fleet.overdue_in(QUICK_S)
            await self._fleet.ended.wait()

    def _on_notify(self, pid: int, message: Mapping[str, str]) -> None:
        if message.get("READY") == "1" and self._fleet is not None:
            self._fleet.notified(pid)

    def _on_bug(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something we did not think of: one line for users, all of it for debugging."""
        error = context.get("exception")
        self._log.error("bug in steer: %s: %r", context.get("message"), error)
        self._log.debug("where it was", exc_info=error)

    # Requests.

    async def _on_status(self, _request: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"service": msgspec.to_builtins(self._report())}

    async def _on_stop(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        self._stop(bool(request.get("quick")))
        if self._fleet is not None:
            await self._fleet.ended.wait()
        return {}

    def _report(self) -> report.Service:
        plan, now_s = self._plan, time.monotonic()
        places = self._fleet.places if self._fleet else []
        return report.Service(
            name=plan.name,
            pid=os.getpid(),
            state=self._state,
            generation=self._generation,
            policy=plan.policy.name,
            backend=self._steering.backend if self._steering else plan.rungs[0].backend,
            backend_reason=self._reason,
            notes=list(self._steering.notes) if self._steering else [],
            uptime_s=round(now_s - self._started_s, 3),
            binds=[report.Address(b.protocol, b.address, b.port) for b in plan.binds],
            workers=[self._worker(place, now_s) for place in places],
            totals=self._totals(),
        )

    def _worker(self, place: Place, now_s: float) -> report.Worker:
        assert self._steering is not None
        counts = self._steering.counts(place.slot)
        process = place.process
        return report.Worker(
            slot=place.slot,
            pid=process.pid if process else None,
            state=place.state.value,
            generation=self._generation,
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
        counts = self._fleet.counts() if self._fleet else None
        if counts is None or self._steering is None:
            return report.Totals()
        unsteered = self._steering.unsteered() or 0
        return report.Totals(
            selected=counts.selected,
            fallback=counts.fallback + unsteered,
            unsteered=unsteered,
            migrated=counts.migrated,
        )


_CARRY_OUT: dict[Act, Callable[[Controller, Step], Awaitable[None]]] = {
    Act.CLAIM: Controller._claim_name,
    Act.CHECK_FREE: Controller._check_free,
    Act.LOAD: Controller._load,
    Act.START: Controller._start_workers,
    Act.STEER: Controller._say_ready,
}


def _write_pid(path: Path) -> Callable[[], None]:
    """Write our process id; the result removes the file if it is still ours.

    Raises:
        ConfigError: it cannot be written, or a living process is in it.
    """
    act = f"write pid file {path}"
    own = f"{os.getpid()}\n"
    try:
        with suppress(FileNotFoundError, ValueError):
            holder = int(path.read_text())
            # In a container we may well have the number we had the last time.
            if holder != os.getpid() and process.is_running(holder):
                raise ConfigError(act, f"it names a running process, {holder}", "stop that first")
        path.write_text(own)
    except OSError as error:
        raise ConfigError(act, error.strerror or str(error), "name another: --pid FILE") from None

    def remove() -> None:
        with suppress(OSError):
            if path.read_text() == own:
                path.unlink()

    return remove
