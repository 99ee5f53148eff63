"""Replaces workers of a running service: new workers serve before old ones end.

A change that does not succeed leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from signal import Signals

from steer.config.plan import Generation, Plan, WorkerSpec
from steer.control.server import Progress
from steer.controller import own_reload
from steer.controller.turns import Turns
from steer.errors import (
    AppLoadError,
    BindError,
    ControlError,
    KernelError,
    WorkersFailed,
)
from steer.workers.drain import until_empty
from steer.workers.handle import WorkerHandle
from steer.workers.intake import Intake
from steer.workers.lifecycle import Event, State
from steer.workers.pool import WorkerPool


def unreported(_text: str, _done: int, _of: int) -> None:
    """Reports no progress, for changes that no client waits for."""


class Rollout:
    """Replaces workers of one service. `renew`, `scale` and `restart` are called in a turn.

    Args:
        pool: the workers.
        persist: stores a generation, and the one in force, in the guard. It is called before there
            are workers of that generation.
        turns: the queue of changes of this service.
        preloading: prepares a new generation: its workers are started in the block. If the block
            fails, the generation in force stays prepared.
    """

    def __init__(
        self,
        pool: WorkerPool,
        persist: Callable[[Generation, Generation], None],
        turns: Turns,
        preloading: Callable[[Generation], AbstractAsyncContextManager[None]],
    ) -> None:
        self._preloading = preloading
        self._pool = pool
        self._persist = persist
        self.turns = turns

    @property
    def generation(self) -> Generation:
        """The generation in force."""
        return self._pool.generation

    async def renew(self, plan: Plan, progress: Progress) -> Generation:
        """Replace all workers by the workers of another plan.

        Servers that open their listeners themselves, and can reload themselves, do that instead if
        nothing has changed that only a start puts in force.

        Raises:
            WorkersFailed, AppLoadError, BindError, KernelError: the new workers do not start.
            ControlError: the service ends, or there is no room for the new workers.
        """
        generation = Generation(self._pool.generation.number + 1, plan)
        number = own_reload.signal_for(self._pool.generation.plan, plan)
        if number is not None:
            await self._reload_each(number, generation)
            return generation
        old = list(self._pool.workers)
        fresh = await self._start_or_explain(plan.all_specs, generation, progress)
        await self._switch(generation, fresh, old)
        return generation

    async def _reload_each(self, number: Signals, generation: Generation) -> None:
        """Have the servers reload themselves, one after the other."""
        for worker in list(self._pool.workers):
            try:
                await own_reload.reload(worker, number)
            except WorkersFailed as error:
                raise error.under(self.turns.act) from None
        self._persist(generation, self._pool.generation)
        for worker in self._pool.workers:
            worker.generation = generation
            self._pool.entries.write(worker)
        self._pool.generation = generation
        self._persist(generation, generation)

    async def scale(self, plan: Plan, progress: Progress) -> None:
        """Start and end workers until there is one for each spec of the plan.

        If no worker that would stay is serving, as all are drained, hung or failing, new workers
        replace them, so that the last worker that serves is not ended without a replacement.

        Raises:
            As `renew`.
        """
        generation = Generation(self._pool.generation.number, plan)
        wanted = frozenset(plan.all_specs)
        there = [worker for worker in self._pool.workers if not worker.is_retiring]
        staying = [worker for worker in there if worker.spec in wanted]
        if any(map(_serves, there)) and not any(map(_serves, staying)):
            staying = []
        specs = {worker.spec for worker in staying}
        new = [spec for spec in plan.all_specs if spec not in specs]
        fresh = await self._start_or_explain(new, generation, progress)
        # Only now: a spare may have taken the place of one of them meanwhile.
        surplus = [worker for worker in there if worker.spec not in specs]
        await self._switch(generation, fresh, surplus)

    async def restart(self, worker: WorkerHandle, progress: Progress) -> WorkerHandle:
        """Replace a worker; the result has the same CPUs and weight.

        Raises:
            As `renew`.
        """
        generation = self._pool.generation
        (fresh,) = await self._start_or_explain([worker.spec], generation, progress)
        self._pool.give_spec(fresh, worker.spec)
        await self._switch(generation, [fresh], [worker])
        return fresh

    async def replace(
        self, worker: WorkerHandle, is_due: Callable[[WorkerHandle], bool], niced: bool = False
    ) -> None:
        """Start another worker for one that is hung, has lost its sockets or exceeds a limit.

        Args:
            is_due: whether the worker still has to be replaced: it may have recovered, or ended.
            niced: whether the other worker starts at a low priority.
        """
        async with self.turns.turn(f"replace worker {worker.slot}"):
            if not is_due(worker):
                return
            generation = self._pool.generation
            (fresh,) = await self._start([worker.spec], generation, unreported, niced=niced)
            if is_due(worker):
                self._pool.give_spec(fresh, worker.spec)
                self._pool.activate([fresh])
                self._persist(self._pool.generation, self._pool.generation)
                self._pool.retire([worker])
            else:
                self._retire([fresh])

    def follow_spares(self) -> None:
        """Start spares, or end them, after a change to or from the kernel's own hash."""
        self._pool.fill()

    async def drain(self, worker: WorkerHandle) -> None:
        """Send a worker nothing new, and wait until its accept queues are empty.

        Raises:
            ControlError: they do not become empty, as the worker does not accept.
        """
        self._pool.report(worker, Event.DRAIN)
        limit_s = self._pool.generation.plan.service.graceful_timeout
        if not await until_empty(
            self._pool.selection.publisher, self._pool.remains, worker, limit_s
        ):
            raise ControlError(
                f"drain worker {worker.slot}",
                f"it gets nothing new, but has not taken what waits for it in {limit_s:g} s",
                "see `steer restart`",
            )

    async def undrain(self, worker: WorkerHandle) -> None:
        self._pool.report(worker, Event.UNDRAIN)
        await self._pool.selection.publisher.published()

    async def _start_or_explain(
        self, specs: Sequence[WorkerSpec], generation: Generation, progress: Progress
    ) -> list[WorkerHandle]:
        """Start workers. If that fails, the error says what runs instead."""
        in_force = self._pool.generation
        is_new = generation.number != in_force.number
        if is_new:
            self._persist(generation, in_force)
        try:
            async with self._preloading(generation) if is_new else nullcontext():
                return await self._start(specs, generation, progress, niced=True)
        except (AppLoadError, BindError, KernelError, WorkersFailed) as error:
            raise error.under(self.turns.act, self._as_before()) from None

    async def _switch(
        self,
        generation: Generation,
        fresh: Sequence[WorkerHandle],
        old: Sequence[WorkerHandle],
    ) -> None:
        """Have the new workers serve in place of the old ones."""
        # All of this in one turn of the loop makes one publication and one message to the guard. So
        # if this controller is killed, the one that adopts finds either all of it or nothing.
        self._pool.generation = generation
        self._pool.activate(fresh)
        self._persist(generation, generation)
        self._pool.retire(old)
        await self._pool.selection.publisher.published()

    def _as_before(self) -> str:
        """Says which generation runs after a change that failed."""
        number = self._pool.generation.number
        if any(worker.is_in_service for worker in self._pool.workers):
            return f"nothing has changed: generation {number} serves on"
        return f"nothing has changed: generation {number} goes on, and no worker of it is ready"

    async def _start(
        self,
        specs: Sequence[WorkerSpec],
        generation: Generation,
        progress: Progress,
        *,
        niced: bool,
    ) -> list[WorkerHandle]:
        """Start workers, as many at a time as `Intake` says, and wait until all are ready. If one
        fails, all of them are retired.

        Args:
            niced: whether the workers start at a low priority.
        """
        fresh: list[WorkerHandle] = []
        intake = Intake(len(os.sched_getaffinity(0)), self._pool.batch)
        began_s: dict[WorkerHandle, float] = {}
        news: asyncio.Queue[WorkerHandle] = asyncio.Queue()
        progress("ready", 0, len(specs))
        try:
            while len(fresh) < len(specs) or began_s:
                few = specs[len(fresh) : len(fresh) + intake.room(len(began_s))]
                if few and news.empty():
                    workers = self._pool.start_held(few, generation, niced, news.put_nowait)
                    fresh += workers
                    began_s |= dict.fromkeys(workers, time.monotonic())
                    await asyncio.sleep(0)  # starting workers takes long: let the loop run
                else:
                    worker = await news.get()
                    _check_not_ended(worker)
                    intake.took(time.monotonic() - began_s.pop(worker))
                    progress("ready", len(fresh) - len(began_s), len(specs))
            for worker in fresh:
                _check_not_ended(worker)
        except BaseException:
            self._retire(fresh)
            raise
        return fresh

    def _retire(self, fresh: Sequence[WorkerHandle]) -> None:
        for worker in fresh:
            self._pool.report(worker, Event.RETIRE)


def _check_not_ended(worker: WorkerHandle) -> None:
    """See that a new worker has neither failed nor ended.

    Raises:
        SteerError: the error of the worker.
        WorkersFailed: it has ended.
    """
    if worker.state not in (State.STARTING, State.READY):
        raise worker.error or WorkersFailed("start workers", f"one is {worker.state.value}")


def _serves(worker: WorkerHandle) -> bool:
    return worker.serves
