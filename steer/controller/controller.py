"""The controller: one parent process that steers, and never touches a connection.

It carries out a plan step by step and undoes what it did in reverse. When the last
step is done workers are running, and `supervisor` looks after them. Where a controller
has ended and its workers go on, it takes them over instead.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec

from steer import abi
from steer.backends.base import Backend
from steer.backends.open import open_backend, open_whole, refuse_uncounted
from steer.child import main, privileges
from steer.child.launch import Launch
from steer.config import candidates, fallback
from steer.config import plan as planning
from steer.config.plan import Generation, Plan, Step
from steer.config.service import Service
from steer.control import abandoned, claim, mailbox, record, rundir, taken
from steer.control.notify import Listener, Notification, Unheard, is_ready
from steer.controller.pidfile import write_pid_file
from steer.controller.startup import while_heard
from steer.errors import (
    ControlError,
    KernelError,
    SteerError,
    in_words,
)
from steer.guard import client
from steer.guard.client import GuardClient, Handover
from steer.guard.store import MAILBOX, STEERING, Settings
from steer.linux import (
    descriptors,
    fork,
    identity,
    output,
    priority,
    services,
    stdio,
    topology,
)
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.loader import find
from steer.policy.builtin import AUTO, EBPF, KERNEL
from steer.policy.cpus import cpus_named
from steer.policy.declarations import Declared
from steer.sockets import reuseport, sockopt
from steer.values import plural
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool

_LOOK_S = 0.002
_TURN_S = 0.0002
LAST_LINES_S = 1.0
"""For who reads standard error to take what waits at our end."""
_SPARE = 10
"""Descriptors that the start of a worker takes, beside two for each of its sockets: three pairs,
a pidfd, and what is looked at in /proc; and some to spare."""

Reread = Callable[[], Service]
"""The configuration as it is now. May raise ConfigError."""


class Left(msgspec.Struct, frozen=True):
    """What the guard has of a service as a whole, for the next controller.

    Args:
        slots, hash_length: of the maps there are.
        generation: the one in force.
        maps: the shapes of the maps there are, in words.
        configured: what was asked for when the service was started or last reloaded.
        policy, policy_reason: what `auto` became, and why; None if the user named the policy.
        declared, digest: the policy's. Its file may be another by then, or gone.
        notify: address of the notification socket.
        admitted: see `WorkerPool`.
    """

    started_s: float
    rung: candidates.BackendCandidate
    slots: int
    hash_length: int
    generation: int
    maps: str
    configured: Service
    policy: str
    policy_reason: str | None
    declared: Declared
    digest: str
    notify: str
    admitted: int = 0


class Controller:
    """One service, as far as it is started.

    Args:
        undo: what to undo, in reverse, at the end or when a step fails.

    Attributes:
        configured: what was asked for; the plan may since have been scaled.
        early: what workers said before there was a loop, with their process ids.
        files: that standard output and error go to, by descriptor; None where that is no file.
        wanted: a plan to change to once it runs, as what was adopted is of another.
    """

    def __init__(
        self,
        plan: Plan,
        environment: Mapping[str, str],
        log: Log,
        reread: Reread,
        undo: ExitStack,
    ) -> None:
        self.plan = plan
        self.environment = environment
        self.log = log
        self.reread = reread
        self.started_s = time.monotonic()
        self.configured = plan.service
        self.wanted: Plan | None = None
        self.early: list[Notification] = []
        self.files = {number: stdio.file_of(number) for number in (1, 2)}
        self.rung: candidates.BackendCandidate
        self.claim: claim.Claim
        self.guard: GuardClient
        self.steering: Backend
        self.pool: WorkerPool
        self.listener: Listener
        self._undo = undo
        self._lost: Sequence[services.Running] = ()
        self._unheard = Unheard(log.warning)
        self._open_before = descriptors.open_descriptors()
        self._files = descriptors.allow_descriptors(self._open_before + plan.descriptors)
        self._spare = Spare(_SPARE + 2 * len(plan.binds))
        undo.callback(self._spare.close)
        self._may_hurry = priority.may_hurry_others()
        identity.identity(plan.service.user, plan.service.group)

    def adopt(self) -> bool:
        """Take over what a controller of this service left; whether there was anything.

        Raises:
            ControlError: it has not ended, or another version of steer left it.
            ConfigError: it ran something that cannot become what we are to run.
            KernelError: the kernel refuses.
        """
        service = self.plan.service
        places = rundir.places(self.plan.name, service.control_socket, self.environment)
        self._lost = taken.await_guard(places, self.environment)
        for path in places:
            # Another user's is none of ours; whether a place is left is seen to later.
            handover = client.adopt(path) if os.access(path, os.W_OK) else None
            if handover is not None:
                try:
                    self._adopt(path, handover)
                except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
                    raise self._differs(f"{type(error).__name__}: {error}") from None
                return True
        return False

    def _differs(self, how: str) -> ControlError:
        act, cure = f"adopt {self.plan.name}", f"`steer stop {self.plan.name}` before you start it"
        return ControlError(act, f"another version of steer has left it: {how}", cure)

    def _adopt(self, path: Path, handover: Handover) -> None:
        entries = handover.entries
        left = msgspec.json.decode(entries["service"].value, type=Left)
        if left.maps != repr(abi.MAPS):
            raise self._differs("its maps have other shapes")
        generations = self._generations(left, handover)
        self.started_s, self.rung = left.started_s, left.rung
        self.claim = claim.Claim.inherited(
            path, handover.control, handover.settings.remove_directory
        )
        self.steering = self._open_left(left.rung.backend)
        address, fd = left.notify, entries[MAILBOX].fds[0]
        self.listener = Listener(self._trusted(), self._unheard, address, fd)
        self._make_guard(handover)
        self._start_guard()
        self._make_fleet(generations[left.generation])
        workers = {key: each for key, each in entries.items() if key.startswith("worker ")}
        self.pool.adopt(generations, left.admitted, workers, entries[STEERING])
        for place in self.pool.places:
            self._keep_generation(place.generation)
        self.keep(generations[left.generation])
        self.early += self.listener.read(mailbox.letters(entries[MAILBOX].value))
        remove_pid = self._write_pid()
        handover.taken(self.guard)
        # Not before: had anything failed, the keeper would carry on with all of it.
        for undo in (self.claim.release, remove_pid, self._close_steering, self.listener.close):
            self._undo.callback(undo)
        self._undo.callback(self.guard.close)
        self._undo.callback(self.pool.abandon)
        living = sum(place.process is not None for place in self.pool.places)
        self.log.info("adopted %s", plural(living, "worker"))

    def _open_left(self, backend: str) -> Backend:
        """Raises KernelError: we may do less than who was here before."""
        try:
            return open_backend(backend, self.plan, empty=True)
        except KernelError as error:
            act, why = f"adopt {self.plan.name}", f"its workers are steered by {backend}: {error}"
            cure = f"run it with what it had, or `steer stop {self.plan.name}` first"
            raise KernelError(act, why, cure) from None

    def _generations(self, left: Left, handover: Handover) -> Mapping[int, Generation]:
        """Those that workers may be of; notes whether the one in force is not what we want."""
        ours, act = self.plan, f"adopt {self.plan.name}"
        services = {
            int(key.split()[1]): msgspec.json.decode(entry.value, type=Service)
            for key, entry in handover.entries.items()
            if key.startswith("generation ")
        }
        in_force = services[left.generation]
        named = left.policy if in_force.policy == AUTO else in_force.policy
        policy = find.as_left(named, left.declared, left.digest)
        running = msgspec.structs.replace(
            ours,
            service=in_force,
            policy=policy,
            policy_reason=left.policy_reason,
            others=(),
            slots=left.slots,
            hash_length=left.hash_length,
            rungs=(left.rung,),
        )
        # Whatever those of another generation were to be chosen by: there is one policy.
        chosen = {"policy": in_force.policy, "params": in_force.params}
        found = {
            number: Generation(
                number,
                planning.again(
                    running, msgspec.structs.replace(service, **chosen), ours.topology, act
                ),
            )
            for number, service in services.items()
        }
        self.plan, self.configured = found[left.generation].plan, left.configured
        # One that was set live is left as it is.
        is_edited = policy.source == ours.policy.source and policy != ours.policy
        if ours.policy.problem is not None:
            self.log.error("%s; what runs goes on as it is", ours.policy.problem)
        elif left.configured != ours.service or is_edited:
            self.wanted = planning.again(running, ours.service, ours.topology, act, ours.candidates)
        return found

    def await_loop(self) -> None:
        """Import the loop, only now that workers are starting, as it takes as long as they
        do. The first that is ready meanwhile does not wait for it.

        Raises:
            Exception: as an import does, MemoryError for one.
        """
        failed: list[Exception] = []

        def load() -> None:
            try:
                importlib.import_module("steer.controller.loop")
            except Exception as error:  # noqa: BLE001 - raised below
                failed.append(error)

        import threading

        importing = threading.Thread(target=load)
        importing.start()
        with _threads_in_turn(_TURN_S):
            # Of a command nobody can serve yet, and who says so in its place, as systemd-notify(1),
            # may end once that is read: then nothing tells whose it was.
            is_over = bool(self.plan.service.command)
            while importing.is_alive() and not is_over:
                fork.wait_until_readable(self.listener.fileno(), _LOOK_S)
                heard = list(self.listener.receive())
                self.early += heard
                ready = (lineage[0] for lineage, message in heard if is_ready(message))
                is_over = any(map(self.pool.serve_early, ready))
            importing.join()
        if failed:
            raise failed[0]

    def keep(self, generation: Generation, current: Generation | None = None) -> None:
        """Have the guard know what the next controller has to.

        Args:
            generation: one that there are or will be workers of.
            current: the one in force, if that is another.
        """
        in_force = (current or generation).number
        self._keep_generation(generation)
        self._keep_service(in_force)
        used = {generation.number, in_force}
        used.update(place.generation.number for place in self.pool.places)
        for key in [key for key in self.guard.entries if key.startswith("generation ")]:
            if int(key.split()[1]) not in used:
                self.guard.drop(key)

    def _keep_generation(self, generation: Generation) -> None:
        service = generation.plan.service
        user = identity.identity(service.user, service.group).uid
        if user is not None:
            self.listener.trust(user)
        self.guard.put(f"generation {generation.number}", msgspec.json.encode(service))

    def _keep_service(self, in_force: int) -> None:
        left = Left(
            self.started_s,
            self.rung,
            self.plan.slots,
            self.plan.hash_length,
            in_force,
            repr(abi.MAPS),
            self.configured,
            self.plan.policy.name,
            self.plan.policy_reason,
            self.plan.policy.declared,
            self.plan.policy.digest,
            self.listener.address,
            self.pool.admitted,
        )
        self.guard.put("service", msgspec.json.encode(left))
        self.guard.put(MAILBOX, b"", [self.listener.fileno()])

    def choose_by(self, plan: Plan) -> None:
        """Another policy, other parameters or weights, on all workers at once, and on the best
        backend that works.

        Raises:
            SteerError: nothing has changed.
        """
        _, self.plan = fallback.first_that_works(plan, self._move_to, lambda _: None)
        self.rung = self.plan.rungs[0]
        self.keep(self.pool.generation)

    def _move_to(self, plan: Plan) -> None:
        """Have the workers there are chosen by this policy, on this backend.

        Raises:
            SteerError: nothing has changed.
        """
        if plan.rungs[0].backend == self.steering.backend:
            refuse_uncounted(plan, self.steering.counting)
            self.pool.choose_by(plan)
            return
        if plan.rungs[0].backend == KERNEL:
            self._see_that_all_serve(plan)
        fresh = open_whole(plan, self.steering)
        try:
            self.pool.choose_by(plan, fresh)
        except BaseException:
            fresh.close()
            raise
        self.steering = fresh

    def _see_that_all_serve(self, plan: Plan) -> None:
        """Raises ControlError: one that should get nothing would, under the kernel's own hash."""
        for place in self.pool.places:
            if place.state in (State.DRAINING, State.HUNG):
                raise ControlError(
                    f"change the policy of {plan.name} to {plan.policy.name}",
                    f"worker {place.slot} is {place.state.value}, and nothing would keep it so",
                    "see `steer undrain` and `steer restart`",
                )

    def configure(self, plan: Plan) -> None:
        """The plan is in force."""
        self.plan = plan
        self.log.configure(plan.service.log_level, plan.service.log_format)
        self.guard.configure(self._settings())

    def reconfigured(self, plan: Plan) -> None:
        """It is, and is what was asked for."""
        self.configured = plan.service
        self.configure(plan)
        self.pool.renew_reserve(plan.service)
        self._keep_service(self.pool.generation.number)

    def allow_descriptors(self, plan: Plan) -> None:
        """Have room for what a changed plan starts, and for what it may start thereafter.

        What is open by now is of the plan in force, and so is in its own count already: only
        one more generation comes on top of it.

        Raises:
            ConfigError: the hard limit on open files is lower.
        """
        one_more = descriptors.open_descriptors() + plan.generation_descriptors
        descriptors.allow_descriptors(max(self._open_before + plan.descriptors, one_more))

    def execute_anew(self) -> NoReturn:
        """Become what is installed now, in the same process: the guard has all else.

        Raises:
            KernelError: the kernel refuses.
        """
        descriptors.limit_descriptors(self._files)
        self.pool.save()
        for place in self.pool.places:
            if place.process:
                place.process.pass_rest_on()
        output.stderr.finish(LAST_LINES_S)
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError as error:
            cure = "start it again: `steer run` adopts the workers"
            cause = in_words(error)
            raise KernelError.from_oserror("execute anew", error, cure=cure, cause=cause) from None

    def _settings(self) -> Settings:
        service = self.plan.service
        return Settings(
            self.plan.name,
            str(self.claim.path),
            self.claim.remove_directory,
            service.pid,
            service.adopt_timeout,
            service.graceful_timeout,
            service.log_format,
        )

    def claim_name(self, _step: Step) -> None:
        service = self.plan.service
        free = self._end_abandoned()
        self.claim = claim.Claim(
            self.plan.name, service.control_socket, self.environment, places=free
        )
        self._undo.callback(self.claim.release)
        if self.claim.refusals:
            places = "; ".join(self.claim.refusals)
            self.log.info("control socket %s, as not at %s", self.claim.path, places)
        self._undo.callback(self._write_pid())

    def renew_control_socket(self) -> None:
        """Its path has gone, and so nobody could find the service: make it again.

        Raises:
            ControlError: another service of the name is there, or no socket can be made.
        """
        before = self.claim.path
        self.claim.renew(self.plan.name, self.plan.service.control_socket, self.environment)
        self.guard.relocate(self._settings())
        self.log.warning("control socket %s was gone; it is %s now", before, self.claim.path)

    def _end_abandoned(self) -> Sequence[Path]:
        """Workers whose controller and guard were both killed hold the ports, and nobody can
        adopt them. Returns where the control socket may be."""
        service, name = self.plan.service, self.plan.name
        places = taken.refuse_taken(name, service.control_socket, self.environment, lost=self._lost)
        # To look through all processes takes time, and is for nothing where ports are free.
        is_held = any(map(reuseport.is_held, self.plan.binds))
        unattended = services.unattended(self.environment) if is_held else ()
        for left in abandoned.find(places, unattended):
            is_here = left.control is not None and bool(record.left(left.control))
            is_ours = left.name == name and abandoned.is_in_the_way(left, self.plan.binds)
            if is_here or is_ours:
                count = plural(len(left.workers), "worker")
                self.log.warning("ending %s whose controller and guard were killed", count)
                end = partial(abandoned.end, left, service.graceful_timeout, False)
                while_heard("end workers that were left", end)
        return places

    def _write_pid(self) -> Callable[[], None]:
        path = self.plan.service.pid
        return write_pid_file(path) if path else _nothing

    def check_free(self, step: Step) -> None:
        for bind in self.plan.binds:
            if bind.label == step.object:
                reuseport.check_free(bind, self.plan.service.settings)

    def load_policy(self, _step: Step) -> None:
        policy = self.plan.policy
        if policy.is_own and self.plan.rungs[0].backend == EBPF:
            # First: only then it is known what it is made from, and so what a reload compares.
            compiled = while_heard(
                f"compile policy {policy.name}",
                lambda: find.compiled(policy),
                self.claim.socket,
            )
            self.plan = msgspec.structs.replace(self.plan, policy=compiled)
        self.steering, self.plan = fallback.first_that_works(
            self.plan, open_whole, self.log.warning
        )
        self._undo.callback(self._close_steering)
        self.rung = self.plan.rungs[0]

    def _close_steering(self) -> None:
        self.steering.close()

    def _announce(self) -> None:
        plan, rung = self.plan, self.rung
        count = plural(len(plan.seats), "worker")
        self.log.info("%s: %s, %s on %s", plan.name, count, plan.policy.name, rung.backend)
        if plan.became:
            self.log.info("policy %s", plan.became)
        if rung.reason:
            self.log.warning("not higher up the ladder: %s", rung.reason)
        if self.steering.samples():
            self.log.warning("%s", self.steering.notes[-1])
        if as_whom := privileges.note(plan.service):
            self.log.info("%s", as_whom)
        if unreachable := privileges.barriers(plan.service, self.environment).note:
            self.log.warning("%s", unreachable)
        for shortfall in sockopt.shortfalls(plan.binds, plan.service.settings):
            self.log.warning("socket option %s", shortfall)
        if rung.fallback:
            self.log.info("ebpf would add: %s", candidates.EBPF_ADDS)

    def start_workers(self, _step: Step) -> None:
        self._announce()
        main.import_for(self.plan.service)
        generation = Generation(1, self.plan)
        self.listener = Listener(self._trusted(), self._unheard)
        self._undo.callback(self.listener.close)
        self._make_guard(None)
        self._undo.callback(self.guard.close)
        self.steering.open_anchors()
        self.steering.open_reserve()
        self._make_fleet(generation)
        self._undo.callback(self.pool.abandon)
        self.keep(generation)
        self.pool.start(self.claim.others_may_start)
        self.pool.save()
        # Should we be killed before that, the kernel tells the workers to finish, see `lifeline`.
        self._start_guard()

    def _make_guard(self, handover: Handover | None) -> None:
        self.guard = GuardClient(self.claim.socket, self._settings(), self._say_as_guard, handover)

    def _start_guard(self) -> None:
        try:
            self.guard.start()
        except OSError as error:
            raise fork.fork_error(error) from None

    def _say_as_guard(self, words: str, form: str) -> None:
        """In the guard's process, where nobody else says what the format is by now."""
        self.log.configure(self.plan.service.log_level, form)
        self.log.warning("%s", words)

    def _make_fleet(self, generation: Generation) -> None:
        slots = self.plan.slots
        launch = self._launch
        retry = Retry(self.log, self._spare)
        self.pool = WorkerPool(
            generation, slots, self.steering, self.guard, launch, self.log, retry, self._unheard
        )
        self.listener.known = self.pool.by_pid

    def _trusted(self) -> frozenset[int]:
        service = self.plan.service
        whom = identity.identity(service.user, service.group)
        return frozenset({0, os.geteuid(), whom.uid or 0})

    def follow_cpus(self) -> None:
        """Seats and table by the CPUs that may be used now: those of the plan may be gone."""
        try:
            now = topology.changed(self.plan.topology)
            if now is None:
                return
            before, allowed = self.plan.topology.allowed, now.allowed
            self.log.warning(
                "this service may now run on %s, and no longer on %s: workers move",
                cpus_named(allowed),
                cpus_named(before),
            )
            self.choose_by(planning.on(self.plan, now))
            self.pool.pin()
        except SteerError as error:
            self.log.error("follow the CPUs that may be used: %s", error)

    def _launch(self, place: WorkerHandle) -> Launch:
        if self.pool.is_watched:
            self.follow_cpus()
        plan = place.generation.plan
        return Launch(
            plan.service,
            plan.name,
            plan.binds,
            place.seat,
            place.slot,
            place.generation.number,
            identity.identity(plan.service.user, plan.service.group),
            self.listener.address,
            self._files,
            self._may_hurry and place.modest,
            frozenset(self.steering.anchors),
        )


@contextmanager
def _threads_in_turn(turn_s: float) -> Iterator[None]:
    """While one imports, another that waits gets its turn after so long: by default after 5 ms,
    and after each system call again."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(turn_s)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


def _nothing() -> None:
    pass
