"""`steer attach`: steers the listeners of a server until a signal or a request ends it."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress

from steer.attach import there
from steer.attach.attachment import Heartbeat
from steer.attach.group import AttachedGroup
from steer.attach.replaced import ReplacedProgram
from steer.attach.requests import Requests
from steer.attach.signals import Signals
from steer.attach.target import Target, text_of
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
_REST = 3
"""How long to rest after a look, in terms of how long it took. A server that opens many listeners
one after the other costs a quarter of a CPU at most, and requests are still answered."""
_CHECKED_S = 10.0
"""How often to check that the group has our program, which takes some 20 ms."""
_WATCHED_S, _UNWATCHED_S, _STARTING_S = 1.0, 0.05, 0.01
"""How often to look for listeners: if programs report them, if none does, and while a process does
not wait on a new one yet."""


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
            group.begin(target.pids, target.left, _replaced(target, undo))
            undo.callback(group.detach)
            undo.callback(Heartbeat(group.attachment.beat).close)
            claim.others_may_start()
            _announce(group, log, time.monotonic() - began_s)
            with asyncio.Runner() as runner:
                runner.run(_AttachedService(group, claim, environment, log).run())
        log.info("detached")
        return 0
    finally:
        output.stderr.finish(_LAST_LINES_S)
        output.stderr.close()


def _replaced(target: Target, undo: ExitStack) -> ReplacedProgram | None:
    """Raises KernelError: it cannot be put back later."""
    if not target.replaced:
        return None
    replaced = ReplacedProgram(target.replaced)
    undo.callback(replaced.close)
    return replaced


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
        self, group: AttachedGroup, claim: Claim, environment: Mapping[str, str], log: Log
    ) -> None:
        self._group = group
        self._claim = claim
        self._log = log
        self._state = ServiceState(environment)
        self._spare = Spare(_SPARE_DESCRIPTORS)
        self._retry = Retry(log, self._spare)
        self._ended = asyncio.Event()
        self._detached = asyncio.Event()
        self._failure: SteerError | None = None
        self._look_again: asyncio.TimerHandle | None = None
        self._heard_fd: int | None = None
        self._heard_s = -math.inf
        self._rested_s = 0.0

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._retry.watch(self._loop)
        Signals(self._ended.set, self._log).watch(self._loop)
        requests = Requests(self._group, self._state, self._log, self._stop)
        self._hear()
        self._look()
        self._loop.call_later(_CHECKED_S, self._check_program)
        with closing(self._spare):
            async with Server(self._claim.socket, requests.handlers(), self._retry):
                self._state.set_running()
                await self._ended.wait()
                self._state.set_stopping()
                self._end()

    async def _stop(self) -> None:
        self._ended.set()
        await self._detached.wait()
        if self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        self._stop_hearing()
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

    def _check_program(self) -> None:
        if not self._ended.is_set():
            self._retry.attempt("check the group's program", self._group.check_program)
            self._loop.call_later(_CHECKED_S, self._check_program)

    def _hear(self) -> None:
        if self._group.joining.watch is not None:
            self._heard_fd = self._group.joining.watch.events.fileno()
            self._loop.add_reader(self._heard_fd, self._heard)

    def _stop_hearing(self) -> None:
        if self._heard_fd is not None:
            self._loop.remove_reader(self._heard_fd)
            self._heard_fd = None

    def _heard(self) -> None:
        if self._group.joining.watch is not None:
            self._group.joining.watch.events.skip()
            # A listener is reported a moment before it can be found, so look again soon.
            self._heard_s = time.monotonic()
            self._look_in(0.0)

    def _look(self) -> None:
        began_s = time.monotonic()
        self._retry.attempt("look for listeners", self._group.look)
        if self._group.joining.watch is None:
            self._stop_hearing()
        ended_s = time.monotonic()
        self._rested_s = ended_s + _REST * (ended_s - began_s)
        self._look_in(self._pause_s())

    def _look_in(self, pause_s: float) -> None:
        """Look again after a pause, which is longer if the last look took long."""
        if self._look_again is not None:
            self._look_again.cancel()
        rest_s = self._rested_s - time.monotonic()
        self._look_again = self._loop.call_later(max(pause_s, rest_s), self._look)

    def _pause_s(self) -> float:
        """Until the next look."""
        now_s, joining = time.monotonic(), self._group.joining
        is_starting = self._group.roster.starting or joining.has_new_room
        if is_starting or now_s < self._heard_s + _STARTING_S:
            return _STARTING_S
        usual_s = _WATCHED_S if joining.watch is not None else _UNWATCHED_S
        due_s = joining.refusals.next_s
        return usual_s if due_s is None else max(_STARTING_S, min(usual_s, due_s - now_s))
