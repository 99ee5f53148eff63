"""Looks after a service that has been started: the loop, signals, requests.

One thread, one loop; a signal handler only says which signal came.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any

import msgspec

from steer.config import auto
from steer.config import plan as planning
from steer.config.candidates import Finding
from steer.config.plan import Generation, Plan
from steer.config.service import FIELDS, MAX_WORKERS, Service, changed
from steer.control.notify import tell_supervisor
from steer.control.server import Handler, Server, Tell
from steer.controller import status
from steer.controller.controller import Controller
from steer.controller.delays import Delays, timed_loop
from steer.controller.garbage import Garbage
from steer.controller.rollout import Rollout, unheard
from steer.errors import ConfigError, ControlError, KernelError, Postponed, SteerError
from steer.health.checks import Health
from steer.health.groups import Groups
from steer.health.split import Splits
from steer.linux import family, fork, output, stdio, topology
from steer.linux.background import in_background
from steer.linux.child_ends import ChildEnds
from steer.linux.retry import as_refusal, is_lack
from steer.loader import find, probe
from steer.policy.builtin import BACKENDS, KERNEL, OWN_SUFFIX, Policy
from steer.sockets import reuseport
from steer.values import plural, shown
from steer.workers.drain import Settler
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.pool import QUICK_S

_FIRST = asyncio.FIRST_COMPLETED
Change = Callable[[], Coroutine[Any, Any, object]]

_POLICY_KEYS = ("policy", "params", "weights")
_CONTROL_S = 2.0
"""How often it is looked whether the control socket can still be found."""
_GARBAGE_S = 2.0
_REAP_S = 0.05
_GONE_S, _AGAIN_S = 2.0, 0.05
"""For workers that failed to be gone, and how often that is looked at."""
_REVIVE_S = 0.5
"""Not at once: whatever kills guards may do it again."""


def supervise(started: Controller) -> bool:
    """Until it is told to end and every worker has, or to execute itself anew.

    Returns:
        Whether it is the latter; then signals are held.

    Raises:
        AppLoadError: the application cannot be loaded.
        WorkersFailed: all workers failed before any was ready.
    """
    garbage = Garbage(lambda: len(started.pool.places))
    try:
        delays = Delays()
        loop_factory = partial(timed_loop, delays)
        with closing(ChildEnds()) as ends, asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(ControllerLoop(started, delays, ends, garbage).run())
    finally:
        output.stderr.watch(None)


class ControllerLoop:
    def __init__(
        self, started: Controller, delays: Delays, child_ends: ChildEnds, garbage: Garbage
    ) -> None:
        self._service = started
        self._garbage = garbage
        self._delays = delays
        self._child_ends = child_ends
        self._pool = started.pool
        self._retry = started.pool.retry
        self._log = started.log
        self._found: Mapping[str, Finding] = {}
        self._state = "starting"
        self._has_terminal = not stdio.terminal_is_gone()
        self._changes: Rollout
        self._health: Health
        self._groups: Groups
        self._splits: Splits
        self._server: Server
        self._anew: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._reaping: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> bool:
        self._loop = loop = asyncio.get_running_loop()
        self._anew = asyncio.Event()
        loop.set_exception_handler(self._on_exception)
        output.stderr.watch(self._on_blocked)
        self._changes = Rollout(self._pool, self._service.keep)
        self._health = Health(self._pool, loop, self._relieve, self._hear_all)
        self._groups = Groups(self._pool, self._renew_sockets)
        self._splits = Splits(self._pool, loop, self._renew_all)
        self._pool.watch(loop, Settler(self._pool, loop).begin, self._changed)
        for lineage, message in self._service.early:
            self._pool.notified(lineage, message)
        self._service.listener.watch(loop, self._notified)
        self._watch_guard()
        # Where workers were adopted, some may be missing.
        self._pool.fill()
        self._splits.go_on()
        self._watch_signals(loop)
        commands = {
            "status": self._on_status,
            "stop": self._on_stop,
            "reload": self._on_reload,
            "scale": self._on_scale,
            "drain": self._on_drain,
            "undrain": self._on_undrain,
            "restart": self._on_restart,
            "policy": self._on_policy,
        }
        told_of = {name: self._told_of(name, each) for name, each in commands.items()}
        async with Server(self._service.claim.socket, told_of, self._retry) as self._server:
            act = "look at the control socket"
            self._pool.looks.add(act, self._look_at_control_socket, 0.0).within(0.0)
            act = "look for garbage"
            self._pool.looks.add(act, self._look_for_garbage, _GARBAGE_S)
            try:
                await self._pool.up
                self._refuse_strangers()
                self._say_ready()
                anew = loop.create_task(self._anew.wait())
                ends = (self._pool.ended, self._pool.refused, anew)
                await asyncio.wait(ends, return_when=_FIRST)
                if self._pool.refused.done():
                    self._pool.refused.result()
            finally:
                if not self._anew.is_set():
                    await self._end_workers()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return self._anew.is_set()

    def _notified(self, lineage: Sequence[int], message: Mapping[str, str]) -> None:
        """It is read, and would not be heard again."""
        heard = partial(self._pool.notified, lineage, message)
        self._retry.until_done(f"hear process {lineage[0] if lineage else 0}", heard)

    @property
    def _plan(self) -> Plan:
        return self._service.plan

    def _refuse_strangers(self) -> None:
        """Somebody may have joined between our look at a port and our first bind there.

        Raises:
            BindError
        """
        processes = [place.process for place in self._pool.places if place.process]
        own = self._service.steering.own_sockets
        inodes = frozenset(os.fstat(sock.fileno()).st_ino for sock in own)
        ours = inodes.union(*(each.inodes for each in processes))
        for bind in self._plan.binds:
            reuseport.refuse_strangers(bind, ours)

    def _say_ready(self) -> None:
        if self._state == "stopping":
            return
        self._state = "running"
        self._log.info("serving %s", ", ".join(bind.label for bind in self._plan.binds))
        for line in self._plan.to_try(sys.argv[0]):
            self._log.info("try: %s", line)
        self._tell_supervisor(f"READY=1\nMAINPID={os.getpid()}")
        if self._service.wanted is not None:
            wanted, now = self._service.wanted, self._service.configured
            differs = [key for key in FIELDS if getattr(wanted.service, key) != getattr(now, key)]
            self._log.info("changing to the configuration as it is now: %s", ", ".join(differs))
            self._begin("change to what was asked for", lambda: self._become(wanted))

    def _tell_supervisor(self, message: str) -> None:
        tell_supervisor(message, self._service.environment)

    # What happens.

    def _watch_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        handlers: Mapping[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: lambda: self._stop(quick=False),
            signal.SIGINT: lambda: self._stop(quick=True),
            signal.SIGQUIT: lambda: self._stop(quick=True),
            signal.SIGUSR1: self._reopen_log,
            signal.SIGUSR2: lambda: self._begin("execute anew", self._execute_anew),
            signal.SIGTTIN: lambda: self._begin(
                "add a worker", lambda: self._scale_by(1, unheard), signal.SIGTTIN
            ),
            signal.SIGTTOU: lambda: self._begin(
                "end a worker", lambda: self._scale_by(-1, unheard), signal.SIGTTOU
            ),
            signal.SIGWINCH: self._on_window_change,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        loop.add_reader(self._child_ends, self._on_child_end)
        self._reap_soon()
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        fork.release_signals()

    def _on_hangup(self) -> None:
        """Asked to reload; or the terminal that it ran in was closed."""
        if self._has_terminal and stdio.terminal_is_gone():
            self._stop(quick=False)
        else:
            self._begin("reload", lambda: self._reload(unheard), signal.SIGHUP)

    def _on_child_end(self) -> None:
        self._child_ends.clear()
        self._reap_soon()

    def _reap_soon(self) -> None:
        """A child that ended may be one that others started, and which nobody else waits for.
        Many may end at once, and one look is enough."""
        if self._reaping is None:
            self._reaping = self._loop.call_later(_REAP_S, self._reap)

    def _reap(self) -> None:
        self._reaping = None
        self._retry.until_done("wait for what has ended", self._reap_orphans)

    def _reap_orphans(self) -> None:
        reaped, is_all = family.reap_orphans()
        self._pool.reaped(reaped)
        if not is_all:
            self._reap_soon()

    def _on_window_change(self) -> None:
        """With a terminal it means that a window has another size."""
        if not self._has_terminal:
            self._begin("end all workers", lambda: self._scale(0, unheard), signal.SIGWINCH)

    def _reopen_log(self) -> None:
        files = {number: path for number, path in self._service.files.items() if path}
        if not files:
            self._log.info("SIGUSR1: no output goes to a file, so there is none to open anew")
        for number, path in files.items():
            try:
                stdio.reopen(number, path)
            except OSError as error:
                self._log.error("open %s anew: %s", path, error.strerror)
        self._service.guard.reopen()
        if 1 in files and not stdio.is_the_log(1):
            words = "workers that run now write to what it was until a reload"
            self._log.info("standard output goes to %s anew; %s", files[1], words)

    def _on_blocked(self) -> None:
        """Standard error takes nothing now."""
        self._loop.add_writer(output.stderr.fileno(), self._write_on)

    def _write_on(self) -> None:
        if output.stderr.flush():
            self._loop.remove_writer(output.stderr.fileno())

    def _stop(self, quick: bool) -> None:
        """Asked a second time, quickly."""
        quick = quick or self._state == "stopping"
        self._log.info("stopping %s", "quickly" if quick else "gracefully")
        self._state = "stopping"
        self._tell_supervisor("STOPPING=1")
        self._changes.end()
        self._pool.stop(QUICK_S if quick else self._plan.service.graceful_timeout, quick)

    async def _end_workers(self) -> None:
        """However we got here, no worker is left."""
        self._changes.end()
        if not self._pool.ended.done():
            self._pool.stop(QUICK_S, quick=True)
            await self._pool.ended
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _relieve(self, place: WorkerHandle) -> None:
        relieve = partial(self._changes.relieve, place, lambda each: each.hangs)
        self._begin(f"replace worker {place.slot}", relieve)

    def _renew_sockets(self, place: WorkerHandle) -> None:
        relieve = partial(self._changes.relieve, place, lambda each: each.is_in_service)
        self._begin(f"replace worker {place.slot}", relieve)

    def _renew_all(self, number: int) -> asyncio.Task[None]:
        act = f"replace all workers of {self._plan.name}"
        return self._begin(act, lambda: self._renew_as_it_is(number))

    async def _renew_as_it_is(self, number: int) -> None:
        """Unless generation `number` has been replaced meanwhile."""
        async with self._changes.turn(f"replace all workers of {self._plan.name}"):
            if self._pool.generation.number == number:
                generation = await self._changes.renew(self._plan, unheard)
                self._log.info("generation %d serves", generation.number)

    def _changed(self, place: WorkerHandle) -> None:
        self._health.changed(place)
        self._groups.changed(place)
        self._splits.changed(place)

    def _begin(
        self, act: str, change: Change, asked_by: signal.Signals | None = None
    ) -> asyncio.Task[None]:
        """Do what nobody waits for; how it goes is logged."""
        task = self._loop.create_task(self._logged(act, change, asked_by))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _logged(self, act: str, change: Change, asked_by: signal.Signals | None) -> None:
        try:
            await change()
        except Postponed:
            # Signals are held by now: it waits for the next controller.
            if asked_by is not None:
                os.kill(os.getpid(), asked_by)
        except Exception as error:  # noqa: BLE001 - logged; nobody else is there to be told
            # Whoever ended the service knows what does not happen any more.
            if self._state != "stopping" or not isinstance(error, ControlError):
                self._log_failure(act, self._as_refusal(act, error))

    def _as_refusal(self, act: str, error: Exception) -> SteerError:
        if not is_lack(error):
            self._log.debug("%s", "".join(traceback.format_exception(error)))
        return as_refusal(act, error)

    def _log_failure(self, act: str, error: SteerError) -> None:
        self._log.error("%s", _of(act, error))
        for line in error.detail.splitlines():
            self._log.error("  | %s", line)

    def _told_of(self, command: str, handler: Handler) -> Handler:
        """What was asked for and refused is in the log, too, but as no error of the service's:
        in one line, as whoever asked is told the rest."""

        async def handle(request: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
            try:
                return await handler(request, tell)
            except Postponed:
                raise
            except Exception as error:  # noqa: BLE001 - who asked is told
                refusal = self._as_refusal(f"{command} {self._plan.name}", error)
                self._log.warning("request refused: %s", _of(command, refusal))
                for line in refusal.detail.splitlines():
                    self._log.debug("  | %s", line)
                raise refusal from None

        return handle

    def _hear_all(self) -> None:
        self._service.listener.hear_all(self._notified)

    def _watch_guard(self) -> None:
        self._loop.add_reader(self._service.guard, self._on_guard_end)

    def _on_guard_end(self) -> None:
        """Somebody killed it: until there is another nobody could take over from us."""
        self._loop.remove_reader(self._service.guard)
        self._log.warning("the guard process was killed; starting another")
        act = "start another guard process"
        self._loop.call_later(_REVIVE_S, self._retry.until_done, act, self._revive_guard)

    def _look_at_control_socket(self) -> float:
        if not self._service.claim.is_there and self._state == "running":
            self._retry.attempt("make the control socket again", self._renew_control_socket)
        self._retry.attempt("write down the workers", self._service.guard.renew_record)
        return _CONTROL_S

    def _look_for_garbage(self) -> float:
        if not self._server.is_asked and not self._tasks:
            self._garbage.set_aside()
        return _GARBAGE_S

    def _renew_control_socket(self) -> None:
        self._loop.remove_reader(self._service.guard)
        try:
            with self._server.elsewhere():
                self._service.renew_control_socket()
        finally:
            self._watch_guard()

    def _revive_guard(self) -> None:
        """Unless a new control socket has brought another meanwhile."""
        guard = self._service.guard
        if guard.has_ended or not guard.alive:
            guard.revive()
        self._watch_guard()

    def _on_exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something failed where nothing of ours catches it: of a callback that stays, as of
        a descriptor that is watched, it is tried again when there is something to do."""
        error = context.get("exception") or RuntimeError(context.get("message"))
        self._retry.failed(str(context.get("message")), error)

    # Changes.

    async def _reload(self, tell: Tell) -> Generation:
        """Raises SteerError: nothing has changed."""
        async with self._changes.turn(f"reload {self._plan.name}"):
            self._tell_supervisor(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                self._service.follow_cpus()
                return await self._renew(await self._planned(self._service.reread()), tell)
            finally:
                if self._state == "running":
                    self._tell_supervisor("READY=1")

    async def _become(self, plan: Plan) -> None:
        async with self._changes.turn(f"reload {plan.name}"):
            await self._renew(await self._planned(plan.service), unheard)

    async def _planned(self, service: Service) -> Plan:
        """Raises SteerError: it cannot become that."""
        act = f"reload {self._plan.name}"
        policy = await _prepared(service.policy)
        candidates = auto.candidates(policy, service, self._findings(), act)
        return planning.again(self._plan, service, topology.read(), act, candidates)

    def _findings(self) -> Mapping[str, Finding]:
        """What could not be done may be possible by now; the rest is not tried again.

        Raises:
            KernelError: steer can run on no backend here.
        """
        self._found = probe.findings(self._found)
        return self._found

    async def _renew(self, plan: Plan, tell: Tell) -> Generation:
        self._service.allow_descriptors(plan)
        before = self._plan
        plan = self._choose_as(plan)
        try:
            generation = await self._changes.renew(plan, tell)
        except SteerError:
            await self._choose_again(before)
            raise
        self._service.reconfigured(plan)
        self._health.retime()
        self._groups.forget()
        self._log.info("generation %d serves", generation.number)
        return generation

    def _choose_as(self, other: Plan) -> Plan:
        """By the policy of another plan, over the workers there are.

        Returns:
            The other plan, with what it came to: the policy and the backend.

        Raises:
            SteerError: nothing has changed.
        """
        now, first = self._plan, other.candidates[0]
        if not now.is_by(first) or now.rungs[0].fallback:
            self._service.choose_by(planning.with_policy_of(now, other, topology.read()))
            self._tell_policy()
        return other.choosing_by(self._plan.candidates)

    async def _choose_again(self, before: Plan) -> None:
        """By the policy that was in force before, where it is not. Classic BPF can only once
        those who were not to stay have gone: until they have, no lower backend will do."""
        if self._plan.is_by(before.candidates[0]):
            return
        now, end_s = topology.read(), self._loop.time() + _GONE_S
        while self._loop.time() < end_s:
            with suppress(SteerError):
                self._service.choose_by(planning.back_to(before, self._plan, now))
                return
            await asyncio.sleep(_AGAIN_S)
        try:
            self._service.choose_by(planning.back_to(before, self._plan, now, lower=True))
        except SteerError as error:
            self._log_failure(f"choose by {before.policy.name} again", error)
        else:
            self._tell_how_low(before)

    def _tell_how_low(self, before: Plan) -> None:
        was, now = before.rungs[0].backend, self._plan.rungs[0]
        if BACKENDS.index(now.backend) > BACKENDS.index(was):
            name = self._plan.policy.name
            self._log.warning("%s is on %s, not on %s: %s", name, now.backend, was, now.reason)

    def _tell_policy(self) -> None:
        plan = self._plan
        self._log.info("%s on %s", plan.policy.name, self._service.steering.backend)
        if plan.became:
            self._log.info("policy %s", plan.became)

    async def _change_policy(self, asked: Mapping[str, Any]) -> None:
        """Raises SteerError: nothing has changed."""
        act = f"change the policy of {self._plan.name}"
        async with self._changes.turn(act):
            now = self._plan
            service = _choosing(now.service, asked, act)
            try:
                policy = await _prepared(service.policy)
                service = _keeping(now, service, policy)
                candidates = auto.candidates(policy, service, self._findings(), act)
                self._service.choose_by(
                    planning.choosing_by(now, service, candidates, topology.read(), act)
                )
            except KernelError as error:
                goes_on = f"nothing has changed: {now.policy.name} goes on"
                raise type(error)(act, str(error), goes_on, error.detail) from None
            self._health.retime()
            self._tell_policy()

    async def _scale_by(self, more: int, tell: Tell) -> int:
        """How many there are then."""
        act = f"scale {self._plan.name} by {more:+}"
        async with self._changes.turn(act):
            there = len(self._plan.seats)
            if not 0 < there + more <= MAX_WORKERS:
                there_are = f"{plural(there, 'worker')} there"
                cause = f"{there_are}, and there may be 1 to {MAX_WORKERS}"
                raise ControlError(act, cause, "see `steer stop`" if more < 0 else "")
            await self._scale_to(there + more, tell)
            return there + more

    async def _scale(self, workers: int, tell: Tell) -> None:
        async with self._changes.turn(f"scale {self._plan.name} to {workers}"):
            await self._scale_to(workers, tell)

    async def _scale_to(self, workers: int, tell: Tell) -> None:
        self._service.follow_cpus()
        plan = planning.scaled(self._plan, workers, topology.read())
        self._service.allow_descriptors(plan)
        await self._changes.scale(plan, tell)
        self._service.configure(plan)
        self._log.info("%s", plural(workers, "worker"))

    async def _execute_anew(self) -> None:
        """Become what is installed now, with the same arguments; workers serve on.

        Raises:
            ConfigError: what is there now, or the configuration, would not start.
            ControlError: there is nobody to hold the workers meanwhile, or no worker.
        """
        act = "execute anew"
        await self._see_that_it_would_start(act)
        while not self._anew.is_set():
            async with self._changes.turn(act):
                # Who asked before us comes first.
                if not self._changes.others_wait:
                    self._leave(act)

    def _leave(self, act: str) -> None:
        """Raises ControlError: not now."""
        if not self._plan.service.adopt_timeout:
            raise ControlError(act, "workers would end with us", "see --adopt-timeout")
        if self._state != "running" or not any(each.process for each in self._pool.places):
            raise ControlError(act, "no worker would be there meanwhile")
        if not self._service.guard.expect_back():
            raise ControlError(act, "the guard process is gone", "there is another soon")
        self._log.info("executing anew")
        fork.hold_signals()
        self._changes.postpone()
        self._anew.set()

    async def _see_that_it_would_start(self, act: str) -> None:
        """Raises ConfigError."""
        at = sys.orig_argv.index("run") + 1
        check = [sys.executable, *sys.orig_argv[1:at], "--check-config", *sys.orig_argv[at:]]
        with fork.starting() as began_as:
            tried = await asyncio.create_subprocess_exec(
                *check, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
            )
            began_as(tried.pid)
        try:
            _, words = await tried.communicate()
        except asyncio.CancelledError:
            tried.kill()
            raise
        fork.is_done(tried.pid)
        if tried.returncode != 0:
            raise ConfigError(act, "it would not start", detail=words.decode(errors="replace"))

    # Requests.

    async def _on_status(self, _request: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        await self._pool.flipped()
        delays = self._delays.report()
        return {"service": await status.report_of(self._service, self._state, delays)}

    async def _on_stop(self, request: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        self._stop(bool(request.get("quick")))
        # Shielded: others wait for it too.
        await asyncio.shield(self._pool.ended)
        return {}

    async def _on_reload(self, _request: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        began_s = time.monotonic()
        generation = await self._reload(tell)
        workers = len(generation.plan.seats)
        return {"generation": generation.number, "workers": workers, **_took(began_s)}

    async def _on_scale(self, request: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        began_s = time.monotonic()
        workers, more = request.get("workers"), request.get("more")
        if workers is None and type(more) is int:
            return {"workers": await self._scale_by(more, tell), **_took(began_s)}
        if type(workers) is not int or not 0 < workers <= MAX_WORKERS:
            act = f"scale {self._plan.name} to {shown(workers)}"
            raise ControlError(
                act, f"a number from 1 to {MAX_WORKERS} is wanted", "see `steer stop`"
            )
        await self._scale(workers, tell)
        return {"workers": workers, **_took(began_s)}

    async def _on_drain(self, request: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        place = self._place(request, "drain", State.READY)
        if self._service.steering.backend == KERNEL:
            raise ControlError(
                f"drain worker {place.slot}",
                "the kernel's own hash leaves nobody out",
                "use ebpf or cbpf, see `steer doctor`",
            )
        if not any(each.serves for each in self._pool.places if each is not place):
            raise ControlError(
                f"drain worker {place.slot}", "no other is ready", "start one, or `steer stop`"
            )
        await self._changes.drain(place)
        return {"slot": place.slot}

    async def _on_undrain(self, request: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        place = self._place(request, "undrain", State.DRAINING)
        await self._changes.undrain(place)
        return {"slot": place.slot}

    async def _on_policy(self, request: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        began_s = time.monotonic()
        await self._change_policy(request)
        chosen, backend = self._plan.policy.name, self._service.steering.backend
        return {"policy": chosen, "backend": backend, **_took(began_s)}

    async def _on_restart(self, request: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        began_s = time.monotonic()
        wanted = (State.READY, State.DRAINING, State.HUNG, State.BACKOFF)
        async with self._changes.turn(f"restart worker {shown(request.get('slot'))}"):
            place = self._place(request, "restart", *wanted)
            fresh = await self._changes.restart(place, tell)
        return {"slot": request["slot"], "new_slot": fresh.slot, **_took(began_s)}

    def _place(self, request: Mapping[str, Any], act: str, *wanted: State) -> WorkerHandle:
        """The place at the slot asked for.

        Raises:
            ControlError: there is none, or in no such state.
        """
        slot = request.get("slot")
        there_are = {place.slot: place for place in self._pool.places}
        found = there_are.get(slot) if type(slot) is int else None
        if found is None:
            there = ", ".join(str(place.slot) for place in self._pool.places)
            raise ControlError(f"{act} worker {shown(slot)}", "no such slot", f"there are: {there}")
        if status.shown(found) not in wanted:
            states = " or ".join(state.value for state in wanted)
            raise ControlError(
                f"{act} worker {slot}", f"it is {status.shown(found).value}", f"has to be {states}"
            )
        return found


async def _prepared(asked: str) -> Policy:
    """See `policies.prepare`. To compile one of the user's own takes its time, and so may its
    file; those of ours are read at once."""
    if asked.endswith(OWN_SUFFIX):
        return await in_background(find.prepare, asked)
    return find.prepare(asked)


def _choosing(service: Service, asked: Mapping[str, Any], act: str) -> Service:
    """The configuration with the policy, parameters and weights asked for.

    Raises:
        ConfigError
    """
    values = {key: asked[key] for key in _POLICY_KEYS if asked.get(key) is not None}
    if values.get("policy") == KERNEL:
        values.setdefault("weights", ())  # it knows none
    return changed(service, {"params": (), **values}, act)


def _keeping(now: Plan, service: Service, policy: Policy) -> Service:
    """With the policy there is, parameters that are not named stay as they are."""
    if service.policy != now.service.policy:
        return service
    known = {param.name for param in policy.declared.params}
    kept = {name: value for name, value in _pairs(now.service.params) if name in known}
    all_of_them = {**kept, **dict(_pairs(service.params))}
    params = tuple(f"{name}={value}" for name, value in all_of_them.items())
    return msgspec.structs.replace(service, params=params)


def _pairs(params: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in params:
        name, _, value = text.partition("=")
        yield name, value


def _of(act: str, error: SteerError) -> str:
    """The error, with the act it kept from being done, named once."""
    line = str(error)
    return line if line.startswith((f"{act} ", f"{act}:")) else f"{act}: {line}"


def _took(began_s: float) -> Mapping[str, float]:
    return {"took_s": round(time.monotonic() - began_s, 3)}
