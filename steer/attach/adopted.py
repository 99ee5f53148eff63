"""`steer run --socket adopt`: servers that open their listeners themselves, and the policy that
selects among these, as for `steer attach`."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from steer.attach import adopted_status
from steer.attach.attachment import Heartbeat
from steer.attach.binds import text_of
from steer.attach.groups import AttachedGroups
from steer.attach.looking import Looking
from steer.attach.requests import Requests
from steer.attach.roster import State
from steer.config import adopting, fallback, servers
from steer.config.plan import Plan
from steer.config.service import Service
from steer.control import schema
from steer.control.server import Handler, Progress
from steer.controller import run as controller_run
from steer.controller.controller import Reread
from steer.controller.rollout import unreported
from steer.controller.state import ServiceState
from steer.errors import (
    AttachRefused,
    CompileError,
    ControlError,
    FallbackRefused,
    SteerError,
    VerifierError,
)
from steer.linux import processes, topology
from steer.linux.log import Log
from steer.linux.procfs import Files
from steer.loader import find, probe
from steer.policy.builtin import KERNEL
from steer.values import plural
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State as WorkerState
from steer.workers.pool import WorkerPool

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from steer.control.protocol import Request

_LOOK_AGAIN_S = 0.1
_OF_LISTENERS = ("policy", "drain", "undrain")
"""The requests that concern listeners. All others concern servers."""
_SELECTS = ("policy", "params", "weights")


def run(
    service: Service,
    environment: Mapping[str, str],
    log: Log,
    reread: Reread,
    *,
    is_in_program: bool = False,
) -> int:
    """Run servers, and select among their listeners, until the service is told to end.

    Args:
        reread, is_in_program: see `controller.run.run`.

    Returns:
        The exit status.

    Raises:
        SteerError: the service could not be started.
    """
    plan = plan_of_listeners(service)
    with ExitStack() as undo:
        listeners = AdoptedListeners(plan, service.strict, log)
        undo.callback(listeners.close)

        def reread_servers() -> Service:
            return adopting.servers(listeners.wants(reread()))

        return controller_run.run(
            adopting.servers(service),
            environment,
            log,
            reread_servers,
            is_in_program=is_in_program,
            own_listeners=listeners,
        )


def plan_of_listeners(service: Service) -> Plan:
    """See `adopting.listeners`. Raises SteerError."""
    findings, policy = probe.findings_before_start(), find.prepare(service.policy)
    return adopting.listeners(service, topology.read(), findings, policy)


class AdoptedListeners:
    """An `OwnListeners`: attached groups, or the kernel's hash if these cannot be.

    Args:
        plan: see `adopting.listeners`.
        strict: whether the kernel's hash is refused.

    Attributes:
        groups: None: the kernel's hash selects.

    Raises:
        SteerError: they cannot be steered, and `strict`; or a custom policy has an error.
    """

    def __init__(self, plan: Plan, strict: bool, log: Log) -> None:
        self._log = log
        self._strict = strict
        self._asked = self._wanted = plan.service
        self._unsteered = plan
        self._undo = ExitStack()
        self._looking: Sequence[Looking] = ()
        self.groups: AttachedGroups | None = None
        if plan.backends[0].backend != KERNEL:
            self._open(plan)
        elif plan.backends[0].reason:
            log.warning("%s", _left(plan.backends[0].reason))

    def _open(self, plan: Plan) -> None:
        try:
            groups, _ = fallback.first_that_works(
                plan, lambda each: AttachedGroups(each, self._log), self._log.warning
            )
        except (CompileError, VerifierError):
            raise
        except SteerError as error:
            self._leave(error)
        else:
            self.groups = groups
            self._undo.callback(groups.close)

    def _leave(self, error: SteerError) -> None:
        """Leave them to the kernel's hash. Raises SteerError: `strict`."""
        self._undo.close()
        self.groups = None
        if self._strict:
            raise error
        why = error.reason if isinstance(error, FallbackRefused) else str(error)
        self._unsteered = adopting.unsteered(self._asked, self._unsteered.topology, why)
        self._log.warning("%s", _left(why))

    def close(self) -> None:
        self._undo.close()

    def begin(self, loop: AbstractEventLoop, pool: WorkerPool) -> None:
        self._pool = pool
        if self.groups is None:
            return
        adopted = [each.process.pid for each in pool.workers if each.process and each.serves]
        try:
            self._begin_each(self.groups, adopted)
        except SteerError as error:
            self._leave(error)
            return
        self._undo.callback(Heartbeat(self.groups.beat).close)
        self._looking = [Looking(loop, each, pool.retry) for each in self.groups]
        for each in self._looking:
            each.begin()
        loop.call_soon(self._look_at_start, loop, self.groups)

    def _begin_each(self, groups: AttachedGroups, adopted: Sequence[int]) -> None:
        """Raises SteerError."""
        try:
            for each in groups:
                if adopted:
                    # Their listeners may have the program of a controller that was killed.
                    each.begin(adopted, left=True)
                else:
                    each.begin_empty()
        except SteerError:
            groups.detach()
            raise

    def _look_at_start(self, loop: AbstractEventLoop, groups: AttachedGroups) -> None:
        """Announce the listeners once there are some, or end the service if it cannot have any."""
        startup = self._pool.startup
        if startup.has_succeeded and all(len(each.roster) for each in groups):
            self._announce(groups)
        elif (refused := self._refusal(groups)) is not None:
            startup.refuse(refused)
        elif not self._pool.shutdown.has_begun:
            loop.call_later(_LOOK_AGAIN_S, self._look_at_start, loop, groups)

    def _refusal(self, groups: AttachedGroups) -> AttachRefused | None:
        """Why none of the listeners of an address will ever be steered; None: some are, or may
        be."""
        for each in groups:
            reasons = each.joining.refusals.by_reason()
            unshared = next((why for why in reasons if why.errno == errno.EINVAL), None)
            if unshared is not None and not len(each.roster):
                act = f"adopt the listeners of {text_of(each.bind)}"
                cure = servers.reuseport_cure(self._asked.command)
                return AttachRefused(act, unshared.found, cure)
        return None

    def _announce(self, groups: AttachedGroups) -> None:
        count, plan = plural(len(groups.members), "listener"), groups.plan
        where = " and ".join(text_of(each) for each in plan.binds)
        self._log.info("%s: %s of %s adopted, %s", plan.name, count, where, plan.policy.name)
        if plan.became:
            self._log.info("policy %s", plan.became)
        for note in adopted_status.notes(groups):
            self._log.warning("%s", note)

    def changed(self, worker: WorkerHandle) -> None:
        is_last = self._pool.shutdown.has_begun
        if worker.state is WorkerState.STOPPING and worker.process and self.groups and not is_last:
            act = f"select no listener of server {worker.slot}"
            self._pool.retry.attempt(act, partial(_drain, self.groups, worker.process.pid))

    def wants(self, service: Service) -> Service:
        """Take note of a configuration that is to be put in force."""
        self._wanted = service
        return service

    async def reconfigured(self) -> None:
        wanted = {key: getattr(self._wanted, key) for key in _SELECTS}
        if self.groups and wanted != {key: getattr(self._asked, key) for key in _SELECTS}:
            await self._requests(self.groups).policy(wanted, unreported)
        self._asked = self._wanted

    def handlers(self) -> Mapping[str, Handler]:
        return {name: partial(self._handle, name) for name in _OF_LISTENERS}

    async def _handle(self, name: str, request: Request, progress: Progress) -> Mapping[str, Any]:
        if self.groups is None:
            why = self._unsteered.backends[0].reason or "the policy is kernel"
            raise ControlError(f"{name} {self._unsteered.name}", _left(why), "see `steer doctor`")
        return await self._requests(self.groups).handlers()[name](request, progress)

    def _requests(self, groups: AttachedGroups) -> Requests:
        return Requests(groups, ServiceState({}), self._log, _never)

    def report(self, pool: schema.Service) -> schema.Service:
        if self.groups is None:
            return adopted_status.unsteered(self._unsteered, pool)
        return adopted_status.steered(self.groups, pool)

    def end(self) -> None:
        for each in self._looking:
            each.end()
        if self.groups is not None:
            self.groups.detach()


def _drain(groups: AttachedGroups, pid: int) -> None:
    """Select no listener of a server that is about to close them, but those of its successor, which
    may not have been admitted yet."""
    family = set(processes.family(pid, Files()))
    for each in groups:
        each.look()
    for group, member in groups.members:
        holds = any(each.pid in family for each in member.holders)
        if holds and member.state in (State.STARTING, State.READY):
            group.drain(member)
    for each in groups:
        each.look()


async def _never() -> None:
    """The pool is asked to stop, not the listeners."""


def _left(why: str) -> str:
    return f"listeners are left to the kernel's hash: {why}"
