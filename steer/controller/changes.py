"""The changes of a running service that users can request. Each waits for its turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from steer.config import plan_change
from steer.config.plan import Generation, Plan
from steer.config.service import MAX_WORKERS, Service
from steer.control.server import Progress
from steer.controller.file_limit import FileLimit
from steer.controller.own_listeners import OwnListeners
from steer.controller.policy_change import PolicyChange, SteeredService
from steer.controller.rollout import Rollout, unreported
from steer.controller.state import ServiceState
from steer.controller.turns import Turns
from steer.errors import ControlError, SteerError
from steer.linux import topology
from steer.linux.log import Log
from steer.values import plural
from steer.workers.handle import WorkerHandle


class ChangeableService(SteeredService, Protocol):
    """What changes need of a controller. `Controller` has the docstrings."""

    @property
    def file_limit(self) -> FileLimit: ...

    @property
    def own_listeners(self) -> OwnListeners: ...

    @property
    def reread(self) -> Callable[[], Service]: ...

    def follow_cpus(self) -> None: ...

    def configure(self, plan: Plan) -> None: ...

    def reconfigured(self, plan: Plan) -> None: ...


class Changes:
    """The changes of one service.

    Args:
        reloaded: is called when another configuration is in force.
        policy_changed: is called when another policy is in force.
    """

    def __init__(
        self,
        service: ChangeableService,
        turns: Turns,
        rollout: Rollout,
        state: ServiceState,
        log: Log,
        reloaded: Callable[[], None],
        policy_changed: Callable[[], None],
    ) -> None:
        self._service = service
        self._turns = turns
        self._rollout = rollout
        self._policy = PolicyChange(service, log)
        self._state = state
        self._log = log
        self._reloaded = reloaded
        self._policy_changed = policy_changed

    @property
    def _plan(self) -> Plan:
        return self._service.plan

    async def reload(self, progress: Progress) -> Generation:
        """Read the configuration again and replace all workers.

        Raises:
            SteerError: nothing has changed.
        """
        act = f"reload {self._plan.name}"
        async with self._turns.turn(act):
            with self._state.reloading():
                self._service.follow_cpus()
                plan = await self._policy.plan_for(self._service.reread(), act)
                return await self._renew(plan, progress)

    async def reload_to(self, plan: Plan) -> None:
        """Reload with the configuration of a plan. Raises SteerError: nothing has changed."""
        act = f"reload {plan.name}"
        async with self._turns.turn(act):
            await self._renew(await self._policy.plan_for(plan.service, act), unreported)

    async def replace_all_workers(self, number: int) -> None:
        """Replace all workers, unless generation `number` has been replaced meanwhile."""
        async with self._turns.turn(f"replace all workers of {self._plan.name}"):
            if self._rollout.generation.number == number:
                generation = await self._rollout.renew(self._plan, unreported)
                self._log.info("generation %d serves", generation.number)

    async def _renew(self, plan: Plan, progress: Progress) -> Generation:
        self._service.file_limit.allow(plan)
        before = self._plan
        plan = self._policy.apply_policy_of(plan)
        try:
            generation = await self._rollout.renew(plan, progress)
        except SteerError:
            await self._policy.restore_policy(before)
            raise
        self._service.reconfigured(plan)
        await self._service.own_listeners.reconfigured()
        self._reloaded()
        self._log.info("generation %d serves", generation.number)
        return generation

    async def change_policy(self, request: Mapping[str, Any]) -> Plan:
        """Change the policy, its parameters or the weights.

        Args:
            request: what to change, see `requested_policy.with_requested`.

        Returns:
            The plan that is in force then.

        Raises:
            SteerError: nothing has changed.
        """
        act = f"change the policy of {self._plan.name}"
        async with self._turns.turn(act):
            await self._policy.change(request, act)
            self._rollout.follow_spares()
            self._policy_changed()
            return self._plan

    async def scale_by(self, more: int, progress: Progress) -> int:
        """Start `more` workers, or end some if it is negative.

        Returns:
            How many workers there are then.

        Raises:
            SteerError: nothing has changed.
        """
        act = f"scale {self._plan.name} by {more:+}"
        async with self._turns.turn(act):
            there = len(self._plan.specs)
            if not 0 < there + more <= MAX_WORKERS:
                there_are = f"{plural(there, 'worker')} there"
                cause = f"{there_are}, and there may be 1 to {MAX_WORKERS}"
                raise ControlError(act, cause, "see `steer stop`" if more < 0 else "")
            await self._scale_to(there + more, progress)
            return there + more

    async def scale(self, workers: int, progress: Progress) -> None:
        """Start or end workers until there are `workers`. Raises SteerError: nothing has
        changed."""
        async with self._turns.turn(f"scale {self._plan.name} to {workers}"):
            await self._scale_to(workers, progress)

    async def _scale_to(self, workers: int, progress: Progress) -> None:
        self._service.follow_cpus()
        plan = plan_change.scaled(self._plan, workers, topology.read())
        self._service.file_limit.allow(plan)
        await self._rollout.scale(plan, progress)
        self._service.configure(plan)
        self._log.info("%s", plural(workers, "worker"))

    async def restart(
        self, find: Callable[[], WorkerHandle], act: str, progress: Progress
    ) -> WorkerHandle:
        """Replace a worker by another, which is returned.

        Args:
            find: finds the worker. It is called when it is our turn, and may raise SteerError.

        Raises:
            SteerError: nothing has changed.
        """
        async with self._turns.turn(act):
            return await self._rollout.restart(find(), progress)

    async def drain(self, worker: WorkerHandle) -> None:
        """See `Rollout.drain`."""
        await self._rollout.drain(worker)

    async def undrain(self, worker: WorkerHandle) -> None:
        """See `Rollout.undrain`."""
        await self._rollout.undrain(worker)
