"""Runs a service that has been started, in one thread and one event loop."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from steer.config.plan import Generation
from steer.config.service import FIELDS
from steer.control import schema
from steer.control.server import Server
from steer.controller import status
from steer.controller.changes import Changes
from steer.controller.children import Children
from steer.controller.controller import Controller
from steer.controller.delays import Delays, timed_loop
from steer.controller.garbage import Garbage
from steer.controller.reexec import Reexec
from steer.controller.requests import Requests
from steer.controller.rollout import Rollout, unreported
from steer.controller.signals import Signals
from steer.controller.standard_streams import StandardStreams
from steer.controller.state import ServiceState
from steer.controller.tasks import Tasks
from steer.controller.turns import Turns
from steer.controller.upkeep import ControlSocketWatch, GuardWatch
from steer.health.checks import Health
from steer.health.groups import Groups
from steer.health.split import Splits
from steer.linux import output
from steer.linux.child_ends import ChildEnds
from steer.sockets import port_checks
from steer.workers import supervision  # noqa: F401 - `WorkerPool.watch` needs it, then at once
from steer.workers.handle import WorkerHandle
from steer.workers.pool import QUICK_S

if TYPE_CHECKING:
    from steer.controller.reload_on_change import ReloadOnChange
    from steer.health.recycling import Recycling

_GARBAGE_S = 2.0


def supervise(started: Controller) -> bool:
    """Run the loop until the service has ended, or until the controller has to be re-executed.

    Returns:
        Whether the controller has to be re-executed. Then signals are held.

    Raises:
        AppLoadError: the application cannot be loaded.
        WorkersFailed: all workers failed before any was ready.
    """
    garbage = Garbage(lambda: len(started.pool.workers))

    async def run(delays: Delays, child_ends: ChildEnds) -> bool:
        loop = asyncio.get_running_loop()
        return await ControllerLoop(started, loop, delays, child_ends, garbage).run()

    try:
        delays = Delays()
        loop_factory = partial(timed_loop, delays)
        with closing(ChildEnds()) as ends, asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(run(delays, ends))
    finally:
        output.stderr.watch(None)


class ControllerLoop:
    """Connects the parts of a running service."""

    def __init__(
        self,
        started: Controller,
        loop: asyncio.AbstractEventLoop,
        delays: Delays,
        child_ends: ChildEnds,
        garbage: Garbage,
    ) -> None:
        self._service = started
        self._loop = loop
        self._garbage = garbage
        self._pool = pool = started.pool
        self._retry = retry = pool.retry
        self._log = log = started.log
        self._state = state = ServiceState(started.environment)
        self._turns = turns = Turns()
        self._rollout = Rollout(pool, started.persist, turns, self._preloading)
        self._tasks = Tasks(loop, state, log)
        self._reexec = Reexec(pool, started.guard, turns, state, log)
        self._health = Health(pool, loop, self._replace_hung, self._receive_all)
        self._groups = Groups(pool, self._replace_for_its_sockets)
        self._splits = Splits(pool, loop, self._renew_all)
        self._recycling: Recycling | None = None
        self._reload_on_change: ReloadOnChange | None = None
        self._changes = Changes(
            started, turns, self._rollout, state, log, self._reloaded, self._health.reconfigure
        )
        self._streams = StandardStreams(started.output_files, started.guard, log)
        self._children = Children(loop, child_ends, retry, pool.reaped)
        self._signals = Signals(
            self._changes, self._reexec, self._tasks, self._stop, self._streams.reopen
        )
        self._guard_watch = GuardWatch(loop, started.guard, retry, log)
        requests = Requests(
            started.plan.name,
            pool,
            self._changes,
            log,
            partial(self._report, delays),
            self._stop,
            started.is_in_program,
        )
        handlers = {**requests.handlers(), **started.own_listeners.handlers()}
        self._server = Server(started.claim.socket, handlers, retry)

    async def run(self) -> bool:
        """Returns whether the controller has to be re-executed. Raises as `supervise`."""
        self._loop.set_exception_handler(self._on_exception)
        self._streams.watch(self._loop)
        self._watch_workers()
        self._children.watch()
        self._signals.watch(self._loop)
        async with self._server:
            self._watch_service()
            try:
                await self._pool.startup.up
                self._refuse_strangers()
                self._say_ready()
                await self._until_over()
            finally:
                if not self._reexec.is_due.is_set():
                    await self._end_workers()
                self._retry.attempt("leave listeners", self._service.own_listeners.end)
        await self._tasks.wait()
        return self._reexec.is_due.is_set()

    def _watch_workers(self) -> None:
        self._service.own_listeners.begin(self._loop, self._pool)
        self._pool.watch(self._loop, self._changed)
        for lineage, message in self._service.early_notifications:
            self._pool.notified(lineage, message)
        self._service.listener.watch(self._loop, self._notified)
        self._guard_watch.begin()
        if self._service.templates is not None:
            from steer.controller import preload

            preload.watch(self._service, self._loop)
        # After an adoption there may be fewer workers than the plan has.
        self._pool.fill()
        self._splits.go_on()

    def _follow_configuration(self) -> None:
        """Begin what few services need, and what is imported only for them."""
        service = self._pool.service
        if self._reload_on_change is None and service.reload_on_change:
            from steer.controller.reload_on_change import ReloadOnChange

            reload = partial(self._changes.reload, unreported)
            self._reload_on_change = ReloadOnChange(reload, self._tasks.begin, self._log)
        if self._reload_on_change is not None:
            self._reload_on_change.follow(service)
        if service.max_memory or service.max_lifetime:
            self._recycler().reconfigure()

    def _preloading(self, generation: Generation) -> AbstractAsyncContextManager[None]:
        service = self._service
        if service.templates is None and not generation.plan.service.preload:
            return nullcontext()
        from steer.controller import preload

        return preload.renewing(service, self._loop, generation)

    def _recycler(self) -> Recycling:
        if self._recycling is None:
            from steer.health.recycling import Recycling

            self._recycling = Recycling(self._pool, self._recycle)
        return self._recycling

    def _watch_service(self) -> None:
        service = self._service
        control = ControlSocketWatch(
            service.claim,
            service.renew_control_socket,
            self._server,
            service.guard,
            self._guard_watch,
            self._state,
            self._retry,
        )
        self._pool.looks.add("look at the control socket", control.look, 0.0).within(0.0)
        self._pool.looks.add("look for garbage", self._look_for_garbage, _GARBAGE_S)
        self._follow_configuration()

    async def _until_over(self) -> None:
        """Wait until the service has ended or has to be re-executed. Raises SteerError: the first
        workers could not be started."""
        reexec = self._loop.create_task(self._reexec.is_due.wait())
        ends = (self._pool.shutdown.ended, self._pool.startup.refused, reexec)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self._pool.startup.refused.done():
            self._pool.startup.refused.result()

    def _refuse_strangers(self) -> None:
        """See that only our processes listen at the ports. Another process of the same user may
        have bound one between our check that the port is free and our first bind.

        Raises:
            BindError: another process listens at a port.
        """
        processes = [worker.process for worker in self._pool.workers if worker.process]
        own = self._service.backend.controller_sockets
        inodes = frozenset(os.fstat(sock.fileno()).st_ino for sock in own)
        ours = inodes.union(*(each.inodes for each in processes))
        for bind in self._service.plan.binds:
            port_checks.refuse_strangers(bind, ours)

    def _say_ready(self) -> None:
        if self._state.is_stopping:
            return
        plan = self._service.plan
        self._log.info("serving %s", ", ".join(bind.label for bind in plan.service.binds))
        for line in plan.suggested_commands(sys.argv[0]):
            self._log.info("try: %s", line)
        self._state.set_running()
        if self._service.pending_plan is not None:
            plan, now = self._service.pending_plan, self._service.configured
            differs = [key for key in FIELDS if getattr(plan.service, key) != getattr(now, key)]
            self._log.info("changing to the new configuration: %s", ", ".join(differs))
            self._tasks.begin(
                "change to the new configuration", lambda: self._changes.reload_to(plan)
            )

    # The end.

    def _stop(self, quick: bool) -> None:
        """Stop the service: quickly if asked a second time."""
        quick = quick or self._state.is_stopping
        self._log.info("stopping %s", "quickly" if quick else "gracefully")
        self._state.set_stopping()
        self._turns.end()
        graceful_timeout_s = self._service.plan.service.graceful_timeout
        self._pool.stop(QUICK_S if quick else graceful_timeout_s, quick)

    async def _end_workers(self) -> None:
        """End all workers that are left, whatever ended the loop."""
        self._turns.end()
        if self._reload_on_change is not None:
            self._reload_on_change.end()
        if not self._pool.shutdown.ended.done():
            self._pool.stop(QUICK_S, quick=True)
            await self._pool.shutdown.ended
        self._tasks.cancel()
        await self._tasks.wait()

    # What workers do.

    def _notified(self, lineage: Sequence[int], message: Mapping[str, str]) -> None:
        """Handle a notification. If that fails it is retried, as no one sends the notification
        again."""
        handle = partial(self._pool.notified, lineage, message)
        sender = lineage[0] if lineage else 0
        self._retry.until_done(f"handle a notification of process {sender}", handle)

    def _receive_all(self) -> None:
        self._service.listener.receive_all(self._notified)

    async def _report(self, delays: Delays) -> schema.Service:
        recycled = dict(self._recycling.replaced) if self._recycling else {}
        delayed = delays.report()
        report = await status.report_of(self._service, self._state.name, delayed, recycled)
        return self._service.own_listeners.report(report)

    def _changed(self, worker: WorkerHandle) -> None:
        self._health.changed(worker)
        self._groups.changed(worker)
        self._splits.changed(worker)
        self._service.own_listeners.changed(worker)
        if worker.asks_replacement and worker.is_in_service:
            self._recycler().asked()

    def _replace_hung(self, worker: WorkerHandle) -> None:
        self._replace(worker, lambda each: each.is_hung)

    def _replace_for_its_sockets(self, worker: WorkerHandle) -> None:
        self._replace(worker, lambda each: each.is_settled)

    def _recycle(self, worker: WorkerHandle) -> asyncio.Task[None]:
        return self._replace(worker, lambda each: each.is_in_service, niced=True)

    def _replace(
        self, worker: WorkerHandle, is_due: Callable[[WorkerHandle], bool], niced: bool = False
    ) -> asyncio.Task[None]:
        change = partial(self._rollout.replace, worker, is_due, niced)
        return self._tasks.begin(f"replace worker {worker.slot}", change)

    def _renew_all(self, number: int) -> asyncio.Task[None]:
        act = f"replace all workers of {self._service.plan.name}"
        return self._tasks.begin(act, lambda: self._changes.replace_all_workers(number))

    def _reloaded(self) -> None:
        self._health.reconfigure()
        self._follow_configuration()
        self._groups.forget()

    # The loop itself.

    def _look_for_garbage(self) -> float:
        if not self._server.has_clients and self._tasks.is_empty:
            self._garbage.set_aside()
        return _GARBAGE_S

    def _on_exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an exception that a callback raised. If a descriptor is watched by it, it is called
        again when that is ready."""
        error = context.get("exception") or RuntimeError(context.get("message"))
        self._retry.failed(str(context.get("message")), error)
