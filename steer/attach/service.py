"""`steer attach`: steers the listeners of a server until a signal or a request ends it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress

from steer.attach import there
from steer.attach.attachment import Heartbeat
from steer.attach.binds import text_of
from steer.attach.group import AttachedGroup
from steer.attach.guard import Guard, WatchedGuard
from steer.attach.looking import Looking
from steer.attach.replaced import ReplacedProgram
from steer.attach.requests import Requests
from steer.attach.restore import Attached, Restore
from steer.attach.signals import Signals
from steer.attach.target import Target
from steer.config import fallback
from steer.config.plan import Plan
from steer.control import taken
from steer.control.claim import Claim
from steer.control.server import Server
from steer.controller.state import ServiceState
from steer.errors import AttachRefused, SteerError
from steer.linux import fork, output, signals, title
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.values import plural

_NICE = -10
_SPARE_DESCRIPTORS = 8
_LAST_LINES_S = 1.0


def run(plan: Plan, target: Target, environment: Mapping[str, str], log: Log) -> int:
    """Steer until a signal or a request ends it, then leave the group as it was.

    Args:
        target: what is there now.

    Returns:
        The exit status.

    Raises:
        SteerError: it cannot be attached.
    """
    began_s = time.monotonic()
    signals.hold_signals()
    title.show(f"steer: controller {plan.name}")
    fork.rename("steer")
    with suppress(PermissionError):
        os.nice(_NICE)  # on busy CPUs, too, new listeners should be found soon
    try:
        with ExitStack() as undo:
            _refuse_attached(plan, environment)
            claim = Claim(
                plan.name,
                plan.service.control_socket,
                environment,
                paths=taken.refuse_taken(plan.name, plan.service.control_socket, environment),
            )
            undo.callback(claim.release)
            group, plan = _open(plan, log)
            undo.callback(group.close)
            replaced = _replaced(target, undo)
            restore = Restore([Attached(target.bind, group.attachment, replaced)], claim, log)
            guard = Guard(plan.name, restore, restore.descriptors())
            undo.callback(_end_guard, guard, group)
            group.begin(target.pids, target.present.left, replaced)
            undo.callback(group.detach)
            undo.callback(Heartbeat(group.attachment.beat).close)
            claim.others_may_start()
            _announce(group, log, time.monotonic() - began_s)
            with asyncio.Runner() as runner:
                runner.run(_AttachedService(group, claim, guard, environment, log).run())
        log.info("detached")
        return 0
    finally:
        output.stderr.finish(_LAST_LINES_S)
        output.stderr.close()


def _replaced(target: Target, undo: ExitStack) -> ReplacedProgram | None:
    """Raises KernelError: it cannot be put back later."""
    if not target.present.replaced:
        return None
    replaced = ReplacedProgram(target.present.replaced)
    undo.callback(replaced.close)
    return replaced


def _end_guard(guard: Guard, group: AttachedGroup) -> None:
    """If this process could not detach, the guard tries it once more."""
    if group.is_detached:
        guard.end()


def _refuse_attached(plan: Plan, environment: Mapping[str, str]) -> None:
    """Raises AttachRefused: another service steers the address already."""
    (bind,) = plan.binds
    for each in there.services_at(bind, environment):
        cause = f"service {each.name} steers it already (pid {each.pid})"
        cure = f"`steer policy {each.name} POLICY`"
        raise AttachRefused(f"attach to {text_of(bind)}", cause, cure)


def _open(plan: Plan, log: Log) -> tuple[AttachedGroup, Plan]:
    """Raises SteerError."""
    return fallback.first_that_works(plan, lambda each: AttachedGroup(each, log), log.warning)


def _announce(group: AttachedGroup, log: Log, took_s: float) -> None:
    plan = group.plan
    count = plural(len(group.roster), "listener")
    where = text_of(plan.binds[0])
    log.info(
        "%s: %s of %s, %s, attached in %.1f ms",
        plan.name,
        count,
        where,
        plan.policy.name,
        1000 * took_s,
    )
    if plan.became:
        log.info("policy %s", plan.became)
    if group.joining.why_unwatched:
        log.warning("listeners that close are not seen in time: %s", group.joining.why_unwatched)
    if group.counting.why_not:
        log.warning("open connections are not counted: %s", group.counting.why_not)


class _AttachedService:
    """What has to be done while it is attached."""

    def __init__(
        self,
        group: AttachedGroup,
        claim: Claim,
        guard: Guard,
        environment: Mapping[str, str],
        log: Log,
    ) -> None:
        self._group = group
        self._claim = claim
        self._guard = guard
        self._log = log
        self._state = ServiceState(environment)
        self._spare = Spare(_SPARE_DESCRIPTORS)
        self._retry = Retry(log, self._spare)
        self._ended = asyncio.Event()
        self._detached = asyncio.Event()
        self._failure: SteerError | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._retry.watch(loop)
        watched = WatchedGuard(self._guard, loop, self._retry)
        watched.begin()
        Signals(self._ended.set, watched.renew, self._log).watch(loop)
        requests = Requests(self._group, self._state, self._log, self._stop)
        looking = Looking(loop, self._group, self._retry)
        looking.begin()
        with closing(self._spare):
            async with Server(self._claim.socket, requests.handlers(), self._retry):
                self._state.set_running()
                await self._ended.wait()
                self._state.set_stopping()
                looking.end()
                watched.end()
                self._end()

    async def _stop(self) -> None:
        self._ended.set()
        await self._detached.wait()
        if self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        # The loop removes its handlers when it is closed, and what is left to do has to be done.
        signals.hold_signals()
        self._retry.attempt("detach", self._detach)
        self._detached.set()

    def _detach(self) -> None:
        try:
            self._group.detach()
        except SteerError as error:
            cure = "once the attacher has ended, the kernel's hash selects"
            self._failure = error.under(f"detach {self._group.plan.name}", cure)
            raise
