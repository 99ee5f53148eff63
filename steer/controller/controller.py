"""The controller of one service: it holds the plan in force and the parts that carry it out.

`start` makes the parts of a service, or `adoption` takes them over from a guard; `loop` runs them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from steer.backends.base import Backend
from steer.child.launch import Launch
from steer.config import fallback
from steer.config.plan import Generation, Plan
from steer.config.service import Service
from steer.control.claim import Claim
from steer.control.notify import IgnoredReady, Listener, Notification
from steer.controller import persisted
from steer.controller.file_limit import FileLimit
from steer.controller.own_listeners import NoOwnListeners, OwnListeners
from steer.controller.persisted import PersistedService
from steer.controller.pidfile import write_pid_file
from steer.errors import SteerError
from steer.guard.client import GuardClient
from steer.guard.handover import Handover
from steer.guard.store import NOTIFICATIONS, Settings
from steer.linux import fork, identity, priority, stdio, topology
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.policy.cpus import cpus_named
from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool

if TYPE_CHECKING:
    from steer.workers.templates import Templates

Reread = Callable[[], Service]
"""Reads the configuration again. May raise ConfigError."""


class Controller:
    """The controller of one service.

    Args:
        reread: reads the configuration again, for a reload.

    Attributes:
        plan: the plan in force.
        configured: the configuration of the start or of the last reload. The plan may have changed
            since, by a request to scale the service or to change its policy.
        pending_plan: after an adoption, the plan to change to once the service runs; None: none.
        is_in_program: whether a program called `steer.run` in this process, see `run.run`.
        early_notifications: notifications of workers that arrived before the loop ran.
        own_listeners: what is done about listeners that workers open themselves.
        output_files: the files that standard output and standard error go to, by descriptor; None:
            the descriptor is no file.
        templates: the template processes; None: no generation of this controller has preloaded.
        claim, guard, listener, pool: the parts. Each exists once its step of the start is done,
            see `start`.
    """

    def __init__(
        self,
        plan: Plan,
        environment: Mapping[str, str],
        log: Log,
        reread: Reread,
        is_in_program: bool = False,
        own_listeners: OwnListeners | None = None,
    ) -> None:
        self.plan = plan
        self.own_listeners = own_listeners or NoOwnListeners()
        self.is_in_program = is_in_program
        self.environment = environment
        self.log = log
        self.reread = reread
        self.started_s = time.monotonic()
        self.configured = plan.service
        self.pending_plan: Plan | None = None
        self.early_notifications: list[Notification] = []
        self.output_files = {number: stdio.file_of(number) for number in (1, 2)}
        self.file_limit = FileLimit(plan)
        self.templates: Templates | None = None
        self.claim: Claim
        self.guard: GuardClient
        self.pool: WorkerPool
        self.listener: Listener
        self._ignored_ready = IgnoredReady(log.warning)
        self._may_renice = priority.may_renice_others()
        identity.identity(plan.service.user, plan.service.group)

    @property
    def backend(self) -> Backend:
        """The backend in force."""
        return self.pool.backend

    # The parts, made by a start or an adoption.

    def write_pid(self) -> Callable[[], None]:
        """Write the pid file if the configuration names one. Returns a function that removes it."""
        path = self.plan.service.pid
        return write_pid_file(path) if path else lambda: None

    def listen(self, address: str = "", fd: int = -1) -> None:
        """Make the notification socket, or use that of an earlier controller.

        Args:
            address, fd: the address and descriptor of the socket of an earlier controller.
        """
        trusted = frozenset({0, os.geteuid(), self._user or 0})
        self.listener = Listener(trusted, self._ignored_ready, address, fd)

    def make_guard(self, handover: Handover | None) -> None:
        self.guard = GuardClient(self.claim.socket, self._settings(), self._log_as_guard, handover)

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
            self._ignored_ready,
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

    def _log_as_guard(self, words: str, form: str) -> None:
        """Log a line in the guard's process.

        Args:
            form: the format of the log in force. A reload may have changed it since the guard was
                forked.
        """
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
        """Store in the guard what the next controller needs.

        Args:
            generation: a generation that has workers, or will have some.
            current: the generation in force; None: it is `generation`.
        """
        in_force = (current or generation).number
        self.persist_generation(generation)
        self._persist_service(in_force)
        used = {generation.number, in_force}
        used.update(worker.generation.number for worker in self.pool.workers)
        persisted.drop_generations(self.guard, used)

    def persist_generation(self, generation: Generation) -> None:
        """Store a generation in the guard, and trust notifications from the user of its workers."""
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
        """Put the policy, parameters and weights of a plan in force for all workers at once, on the
        best backend that works.

        Raises:
            SteerError: nothing has changed.
        """
        from steer.controller.backend_change import move_to

        _, self.plan = fallback.first_that_works(
            plan, lambda each: move_to(self.pool, each), lambda _: None
        )
        self.persist(self.pool.generation)

    def configure(self, plan: Plan) -> None:
        """Put a plan in force whose workers already serve."""
        self.plan = plan
        self.log.configure(plan.service.log_level, plan.service.log_format)
        self.guard.configure(self._settings())

    def reconfigured(self, plan: Plan) -> None:
        """Put the plan of another configuration in force, whose workers already serve."""
        self.configured = plan.service
        self.configure(plan)
        self.pool.selection.renew_controller_sockets(plan.service)
        self._persist_service(self.pool.generation.number)

    def renew_control_socket(self) -> None:
        """Make the control socket again after its path was removed.

        Raises:
            ControlError: another service of that name is running, or no socket can be made.
        """
        before = self.claim.path
        self.claim.renew(self.plan.name, self.plan.service.control_socket, self.environment)
        self.guard.relocate(self._settings())
        self.log.warning("control socket %s was removed; now it is %s", before, self.claim.path)

    def follow_cpus(self) -> None:
        """If the CPUs that the service may use have changed, set the specs of the workers, the
        table and the CPU affinity of the workers by them."""
        try:
            now = topology.changed(self.plan.topology)
            if now is None:
                return
            before, allowed = self.plan.topology.allowed, now.allowed
            self.log.warning(
                "allowed CPUs changed: %s instead of %s; moving workers",
                cpus_named(allowed),
                cpus_named(before),
            )
            from steer.config import plan_change

            self.apply_policy(plan_change.on_cpus(self.plan, now))
            self.pool.pin()
        except SteerError as error:
            self.log.error("move workers to the allowed CPUs: %s", error)
