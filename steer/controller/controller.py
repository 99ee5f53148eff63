"""One service: the plan in force, what carries it out, and what changes both together.

The controller is the parent process; it steers, and never touches a connection. `start` makes the
parts of a service, or `adoption` takes them over; `loop` looks after them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from steer.backends.base import Backend
from steer.child.launch import Launch
from steer.config import fallback
from steer.config.plan import Generation, Plan
from steer.config.service import Service
from steer.control.claim import Claim
from steer.control.notify import Listener, Notification, Unheard
from steer.controller import persisted
from steer.controller.file_limit import FileLimit
from steer.controller.persisted import PersistedService
from steer.controller.pidfile import write_pid_file
from steer.errors import KernelError, SteerError, in_words
from steer.guard.client import GuardClient
from steer.guard.handover import Handover
from steer.guard.store import NOTIFICATIONS, Settings
from steer.linux import fork, identity, output, priority, stdio, topology
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.policy.cpus import cpus_named
from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool

LAST_LINES_S = 1.0
"""For who reads standard error to take what waits at our end."""

Reread = Callable[[], Service]
"""The configuration as it is now. May raise ConfigError."""


class Controller:
    """One service, as far as it is started.

    Attributes:
        plan: in force.
        configured: what was asked for; the plan may since have been scaled.
        wanted: a plan to change to once it runs, as what was adopted is of another.
        early: what workers said before there was a loop, with their process ids.
        files: that standard output and error go to, by descriptor; None where that is no file.
        claim, guard, listener, pool: there from a step of the start on, see `start`.
    """

    def __init__(
        self, plan: Plan, environment: Mapping[str, str], log: Log, reread: Reread
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
        self.file_limit = FileLimit(plan)
        self.claim: Claim
        self.guard: GuardClient
        self.pool: WorkerPool
        self.listener: Listener
        self._unheard = Unheard(log.warning)
        self._may_renice = priority.may_renice_others()
        identity.identity(plan.service.user, plan.service.group)

    @property
    def backend(self) -> Backend:
        """The backend in force."""
        return self.pool.backend

    # The parts, made by a start or an adoption.

    def write_pid(self) -> Callable[[], None]:
        """Write the pid file, if one is wanted. The result removes it."""
        path = self.plan.service.pid
        return write_pid_file(path) if path else lambda: None

    def listen(self, address: str = "", fd: int = -1) -> None:
        """Make the notification socket, or go on with that of an earlier controller."""
        trusted = frozenset({0, os.geteuid(), self._user or 0})
        self.listener = Listener(trusted, self._unheard, address, fd)

    def make_guard(self, handover: Handover | None) -> None:
        self.guard = GuardClient(self.claim.socket, self._settings(), self._say_as_guard, handover)

    def start_guard(self) -> None:
        """Raises KernelError: no more processes, or no more files."""
        try:
            self.guard.start()
        except OSError as error:
            raise fork.fork_error(error) from None

    def make_pool(self, generation: Generation, backend: Backend) -> None:
        retry = Retry(self.log, self.file_limit.spare)
        self.pool = WorkerPool(
            generation,
            self.plan.slots,
            backend,
            self.guard,
            self._launch,
            self.log,
            retry,
            self._unheard,
        )
        self.listener.known = self.pool.workers.by_pid

    @property
    def _user(self) -> int | None:
        service = self.plan.service
        return identity.identity(service.user, service.group).uid

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

    def _say_as_guard(self, words: str, form: str) -> None:
        """In the guard's process, where nobody else says what the format is by now."""
        self.log.configure(self.plan.service.log_level, form)
        self.log.warning("%s", words)

    def _launch(self, worker: WorkerHandle) -> Launch:
        if self.pool.is_watched:
            self.follow_cpus()
        plan = worker.generation.plan
        return Launch(
            plan.service,
            plan.name,
            plan.binds,
            worker.spec,
            worker.slot,
            worker.generation.number,
            identity.identity(plan.service.user, plan.service.group),
            self.listener.address,
            self.file_limit.inherited,
            self._may_renice and worker.niced,
            frozenset(self.backend.anchors),
        )

    # What the guard stores.

    def persist(self, generation: Generation, current: Generation | None = None) -> None:
        """Have the guard know what the next controller has to.

        Args:
            generation: one that there are or will be workers of.
            current: the one in force, if that is another.
        """
        in_force = (current or generation).number
        self.persist_generation(generation)
        self._persist_service(in_force)
        used = {generation.number, in_force}
        used.update(worker.generation.number for worker in self.pool.workers)
        persisted.drop_generations(self.guard, used)

    def persist_generation(self, generation: Generation) -> None:
        """And trust what its workers notify."""
        service = generation.plan.service
        user = identity.identity(service.user, service.group).uid
        if user is not None:
            self.listener.trust(user)
        persisted.put_generation(self.guard, generation.number, service)

    def _persist_service(self, in_force: int) -> None:
        plan = self.plan
        service = PersistedService(
            started_s=self.started_s,
            backend=plan.backends[0],
            slots=plan.slots,
            hash_length=plan.hash_length,
            generation=in_force,
            configured=self.configured,
            policy=plan.policy.name,
            policy_reason=plan.policy_reason,
            declared=plan.policy.declared,
            digest=plan.policy.digest,
            notify=self.listener.address,
            activated=self.pool.activated,
        )
        persisted.put_service(self.guard, service)
        self.guard.put(NOTIFICATIONS, b"", [self.listener.fileno()])

    # What changes while it runs.

    def apply_policy(self, plan: Plan) -> None:
        """Another policy, other parameters or weights, on all workers at once, and on the best
        backend that works.

        Raises:
            SteerError: nothing has changed.
        """
        from steer.controller.backend_change import move_to

        _, self.plan = fallback.first_that_works(
            plan, lambda each: move_to(self.pool, each), lambda _: None
        )
        self.persist(self.pool.generation)

    def configure(self, plan: Plan) -> None:
        """The plan is in force."""
        self.plan = plan
        self.log.configure(plan.service.log_level, plan.service.log_format)
        self.guard.configure(self._settings())

    def reconfigured(self, plan: Plan) -> None:
        """It is, and is what was asked for."""
        self.configured = plan.service
        self.configure(plan)
        self.pool.renew_controller_sockets(plan.service)
        self._persist_service(self.pool.generation.number)

    def renew_control_socket(self) -> None:
        """Its path has gone, and so nobody could find the service: make it again.

        Raises:
            ControlError: another service of the name is there, or no socket can be made.
        """
        before = self.claim.path
        self.claim.renew(self.plan.name, self.plan.service.control_socket, self.environment)
        self.guard.relocate(self._settings())
        self.log.warning("control socket %s was gone; it is %s now", before, self.claim.path)

    def follow_cpus(self) -> None:
        """Set specs and table by the CPUs that may be used now: those of the plan may be gone."""
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
            from steer.config import plan_change

            self.apply_policy(plan_change.on_cpus(self.plan, now))
            self.pool.pin()
        except SteerError as error:
            self.log.error("follow the CPUs that may be used: %s", error)

    def reexecute(self) -> NoReturn:
        """Become what is installed now, in the same process: the guard has all else.

        Raises:
            KernelError: the kernel refuses.
        """
        self.file_limit.put_back()
        self.pool.save()
        for worker in self.pool.workers:
            if worker.process:
                worker.process.pass_rest_on()
        output.stderr.finish(LAST_LINES_S)
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError as error:
            cure = "start it again: `steer run` adopts the workers"
            cause = in_words(error)
            raise KernelError.from_oserror("re-execute", error, cure=cure, cause=cause) from None
