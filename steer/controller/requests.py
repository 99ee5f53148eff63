"""Answers the requests at the control socket.

Each row of `commands.COMMANDS` has a method here with the name of the command.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from steer.config.service import MAX_WORKERS
from steer.control import schema
from steer.control.commands import COMMANDS
from steer.control.outcomes import Drained, Reloaded, Restarted, Scaled, Swapped
from steer.control.protocol import Request
from steer.control.server import Handler, Progress
from steer.controller import status
from steer.controller.changes import Changes
from steer.controller.refusals import Answer, logged
from steer.errors import ControlError
from steer.linux.log import Log
from steer.policy.builtin import KERNEL
from steer.values import shown
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool

_READY, _DRAINING = State.READY.value, State.DRAINING.value
_MAY_RESTART = (_READY, _DRAINING, State.HUNG.value, State.BACKOFF.value, status.SPARE)


class Requests:
    """The requests to one service.

    Args:
        name: the name of the service.
        report: gathers the status of the service.
        stop: ends the service; its argument says whether quickly.
        is_in_program: whether this process may go on afterwards.
    """

    def __init__(
        self,
        name: str,
        pool: WorkerPool,
        changes: Changes,
        log: Log,
        report: Callable[[], Awaitable[schema.Service]],
        stop: Callable[[bool], None],
        is_in_program: bool = False,
    ) -> None:
        self._is_in_program = is_in_program
        self._name = name
        self._pool = pool
        self._changes = changes
        self._report = report
        self._log = log
        self._stop = stop

    def handlers(self) -> Mapping[str, Handler]:
        """The handlers, by the name of the command."""
        return {
            name: logged(command, getattr(self, name), self._name, self._log)
            for name, command in COMMANDS.items()
        }

    async def status(self, _request: Request, _progress: Progress) -> Answer:
        await self._pool.selection.publisher.published()
        return {"service": await self._report()}

    async def stop(self, request: Request, _progress: Progress) -> Answer:
        self._stop(bool(request.get("quick")))
        # Other requests wait for the same future: ours must not cancel it.
        await asyncio.shield(self._pool.shutdown.ended)
        return {"is_in_program": self._is_in_program}

    async def reload(self, _request: Request, progress: Progress) -> Answer:
        began_s = time.monotonic()
        generation = await self._changes.reload(progress)
        return Reloaded(generation.number, len(generation.plan.specs), _since(began_s))

    async def scale(self, request: Request, progress: Progress) -> Answer:
        began_s = time.monotonic()
        workers, more = request.get("workers"), request.get("more")
        if workers is None and type(more) is int:
            return Scaled(await self._changes.scale_by(more, progress), _since(began_s))
        if type(workers) is not int or not 0 < workers <= MAX_WORKERS:
            act = f"scale {self._name} to {shown(workers)}"
            raise ControlError(
                act, f"a number from 1 to {MAX_WORKERS} is wanted", "see `steer stop`"
            )
        await self._changes.scale(workers, progress)
        return Scaled(workers, _since(began_s))

    async def drain(self, request: Request, _progress: Progress) -> Answer:
        worker = self._worker(request, "drain", _READY)
        if self._pool.backend.name == KERNEL:
            raise ControlError(
                f"drain worker {worker.slot}",
                "the kernel's own hash selects every worker",
                "use ebpf or cbpf, see `steer doctor`",
            )
        if not any(each.serves for each in self._pool.workers if each is not worker):
            raise ControlError(
                f"drain worker {worker.slot}", "no other is ready", "start one, or `steer stop`"
            )
        await self._changes.drain(worker)
        return Drained(worker.slot)

    async def undrain(self, request: Request, _progress: Progress) -> Answer:
        worker = self._worker(request, "undrain", _DRAINING)
        await self._changes.undrain(worker)
        return Drained(worker.slot)

    async def restart(self, request: Request, progress: Progress) -> Answer:
        began_s = time.monotonic()
        slot = request.get("slot")
        fresh = await self._changes.restart(
            lambda: self._worker(request, "restart", *_MAY_RESTART),
            f"restart worker {shown(slot)}",
            progress,
        )
        return Restarted(request["slot"], fresh.slot, _since(began_s))

    async def policy(self, request: Request, _progress: Progress) -> Answer:
        began_s = time.monotonic()
        plan = await self._changes.change_policy(request)
        return Swapped(plan.policy.name, plan.backends[0].backend, _since(began_s))

    def _worker(self, request: Request, act: str, *allowed: str) -> WorkerHandle:
        """The worker in the slot that the request names.

        Raises:
            ControlError: the slot has no worker, or one in a state that is not allowed.
        """
        slot = request.get("slot")
        there_are = {worker.slot: worker for worker in self._pool.workers}
        found = there_are.get(slot) if type(slot) is int else None
        if found is None:
            there = ", ".join(str(worker.slot) for worker in self._pool.workers)
            raise ControlError(f"{act} worker {shown(slot)}", "no such slot", f"there are: {there}")
        state = status.displayed_state(found)
        if state not in allowed:
            raise ControlError(
                f"{act} worker {slot}",
                f"it is {state}",
                f"has to be {' or '.join(allowed)}",
            )
        return found


def _since(began_s: float) -> float:
    return round(time.monotonic() - began_s, 3)
