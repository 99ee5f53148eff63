"""`steer attach`: steers the listeners of a server until a signal or a request ends it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing

from steer.attach import stand_in
from steer.attach.attachment import Heartbeat
from steer.attach.beginning import Beginning
from steer.attach.binds import text_of
from steer.attach.groups import AttachedGroups
from steer.attach.guard import Guard, WatchedGuard
from steer.attach.looking import Looking
from steer.attach.requests import Requests
from steer.attach.restore import Attached, Restore
from steer.attach.signals import Signals
from steer.attach.stand_in import Attacher
from steer.config import fallback
from steer.config.address import Bind
from steer.config.plan import Plan
from steer.control.claim import Claim
from steer.control.server import Server
from steer.controller.state import ServiceState
from steer.errors import Postponed, SteerError
from steer.linux import fork, output, signals, title
from steer.linux.background import in_background
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.values import plural

_SPARE_DESCRIPTORS = 8
_LAST_LINES_S = 1.0


def run(plan: Plan, beginning: Beginning, environment: Mapping[str, str], log: Log) -> int:
    """Steer until a signal or a request ends it, then leave the group as it was.

    Returns:
        The exit status.

    Raises:
        SteerError: it cannot be attached.
    """
    began_s = time.monotonic()
    signals.hold_signals()
    title.show(f"steer: controller {plan.name}")
    fork.rename("steer")
    try:
        with ExitStack() as undo:
            claim = beginning.claim(plan, environment)
            undo.callback(claim.release)
            groups, _ = _open(plan, beginning.sockmaps(), log)
            undo.callback(groups.close)
            replaced = beginning.replaced()
            for each in replaced.values():
                undo.callback(each.close)
            attached = [
                Attached(each.bind, each.attachment, replaced.get(each.bind)) for each in groups
            ]
            restore = Restore(attached, claim, log)
            guard = Guard(plan.name, restore, restore.descriptors())
            undo.callback(_end_guard, guard, groups)
            beginning.begin(groups, replaced)
            undo.callback(groups.detach)
            undo.callback(Heartbeat(groups.beat).close)
            claim.others_may_start()
            _announce(groups, log, time.monotonic() - began_s)
            service = _AttachedService(groups, claim, guard, environment, log)
            with asyncio.Runner() as runner:
                runner.run(service.run())
            if service.is_handing_over:
                stand_in.reexecute(Attacher(groups, replaced, claim, guard, restore, log))
        log.info("detached")
        return 0
    finally:
        output.stderr.finish(_LAST_LINES_S)
        output.stderr.close()


def _end_guard(guard: Guard, groups: AttachedGroups) -> None:
    """If this process could not detach, the guard tries it once more."""
    if groups.is_detached:
        guard.end()


def _open(plan: Plan, sockmaps: Collection[Bind], log: Log) -> tuple[AttachedGroups, Plan]:
    """Raises SteerError."""
    return fallback.first_that_works(
        plan, lambda each: AttachedGroups(each, log, sockmaps), log.warning
    )


def _announce(groups: AttachedGroups, log: Log, took_s: float) -> None:
    plan = groups.plan
    log.info(
        "%s: %s of %s, %s, attached in %.1f ms",
        plan.name,
        plural(len(groups.members), groups.wording.socket),
        " and ".join(text_of(each) for each in plan.binds),
        plan.policy.name,
        1000 * took_s,
    )
    if plan.became:
        log.info("policy %s", plan.became)
    if groups.sockmaps:
        log.info("the server's sockets are in a sockmap, so they are selected from one")
    for why in dict.fromkeys(each.joining.why_unwatched for each in groups):
        if why:
            log.warning("sockets that close are not seen in time: %s", why)
    for why in dict.fromkeys(each.counting.why_not for each in groups):
        if why:
            log.warning("open connections are not counted: %s", why)


class _AttachedService:
    """What has to be done while it is attached."""

    def __init__(
        self,
        groups: AttachedGroups,
        claim: Claim,
        guard: Guard,
        environment: Mapping[str, str],
        log: Log,
    ) -> None:
        self._groups = groups
        self._claim = claim
        self._guard = guard
        self._log = log
        self._state = ServiceState(environment)
        self._spare = Spare(_SPARE_DESCRIPTORS)
        self._retry = Retry(log, self._spare)
        self._ended = asyncio.Event()
        self._detached = asyncio.Event()
        self._failure: SteerError | None = None
        self.is_handing_over = False
        self._reexecuting: asyncio.Future[None] | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._retry.watch(loop)
        watched = WatchedGuard(self._guard, loop, self._retry)
        watched.begin()
        Signals(self._ended.set, watched.renew, self._reexecute, self._log).watch(loop)
        requests = Requests(self._groups, self._state, self._log, self._stop)
        looking = [Looking(loop, each, self._retry) for each in self._groups]
        for each in looking:
            each.begin()
        with closing(self._spare):
            async with Server(self._claim.socket, requests.handlers(), self._retry):
                self._state.set_running()
                await self._ended.wait()
                for each in looking:
                    each.end()
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
        if self.is_handing_over:
            self._failure = Postponed("detach", "the attacher is being replaced", "ask again")
        else:
            self._state.set_stopping()
            self._retry.attempt("detach", self._detach)
        self._detached.set()

    def _reexecute(self) -> None:
        if self._reexecuting is None or self._reexecuting.done():
            self._reexecuting = asyncio.ensure_future(self._hand_over())

    async def _hand_over(self) -> None:
        """End the loop, if the installed version of steer would start."""
        try:
            await in_background(stand_in.check_would_start)
        except (SteerError, OSError, subprocess.TimeoutExpired) as error:
            self._log.error("%s", error)
        else:
            if not self._ended.is_set():
                self.is_handing_over = True
                self._ended.set()

    def _detach(self) -> None:
        try:
            self._groups.detach()
        except SteerError as error:
            cure = "once the attacher has ended, the kernel's hash selects"
            self._failure = error.under(f"detach {self._groups.plan.name}", cure)
            raise
