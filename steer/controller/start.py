"""Starts a service: carries out the steps of its plan, and registers how to undo each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec

from steer.backends import shortfalls
from steer.backends.base import Backend
from steer.backends.open import open_first
from steer.child import loading, privileges
from steer.config import candidates, fallback
from steer.config.plan import Act, Generation, Step
from steer.control import abandoned, record, taken
from steer.control.claim import Claim
from steer.controller.controller import Controller
from steer.controller.slow_steps import run_answering
from steer.linux import services
from steer.loader import find
from steer.policy.builtin import EBPF
from steer.sockets import port_checks, sockopt
from steer.values import plural


class Start:
    """The start of one service.

    Args:
        service: a controller that has no parts yet; the steps make them.
        lost: the result of `taken.await_guard`.
        undo: gets what has to be undone, in reverse order, at the end or when a step fails.
    """

    def __init__(
        self, service: Controller, lost: Sequence[services.Running], undo: ExitStack
    ) -> None:
        self._service = service
        self._log = service.log
        self._lost = lost
        self._undo = undo
        self._backend: Callable[[], Backend]

    def carry_out(self) -> None:
        """Carry out all steps.

        Raises:
            SteerError: a step failed.
        """
        for step in self._service.plan.steps():
            CARRY_OUT[step.act](self, step)

    def claim_name(self, _step: Step) -> None:
        service, plan = self._service, self._service.plan
        free = self._end_abandoned()
        control_socket = plan.service.control_socket
        service.claim = Claim(plan.name, control_socket, service.environment, paths=free)
        self._undo.callback(service.claim.release)
        if service.claim.refusals:
            paths = "; ".join(service.claim.refusals)
            self._log.info("control socket: %s; could not use %s", service.claim.path, paths)
        self._undo.callback(service.write_pid())

    def _end_abandoned(self) -> Sequence[Path]:
        """End workers of this service whose controller and guard were both killed: they hold the
        ports, and cannot be adopted.

        Returns:
            The paths that the control socket may have.

        Raises:
            ControlError: a service of this name is running.
        """
        plan, environment = self._service.plan, self._service.environment
        paths = taken.refuse_taken(
            plan.name, plan.service.control_socket, environment, lost=self._lost
        )
        # Looking through all processes takes time, and is not needed if the ports are free.
        is_held = any(map(port_checks.is_held, plan.service.binds))
        unattended = services.unattended(environment) if is_held else ()
        for each in abandoned.find(paths, unattended):
            is_here = each.control is not None and bool(record.living(each.control))
            is_ours = each.name == plan.name and abandoned.is_in_the_way(each, plan.service.binds)
            if is_here or is_ours:
                count = plural(len(each.workers), "worker")
                self._log.warning("ending %s whose controller and guard were killed", count)
                end = partial(abandoned.end, each, plan.service.graceful_timeout, False)
                run_answering("end abandoned workers", end)
        return paths

    def check_free(self, step: Step) -> None:
        plan = self._service.plan
        for bind in plan.service.binds:
            if bind.label == step.object:
                port_checks.check_free(bind, plan.service.settings)

    def load_policy(self, _step: Step) -> None:
        service, policy = self._service, self._service.plan.policy
        if policy.is_custom and service.plan.backends[0].backend == EBPF:
            # Compile it first: that finds the files it includes, whose digest a reload compares.
            compiled = run_answering(
                f"compile policy {policy.name}",
                lambda: find.compiled(policy),
                service.claim.socket,
            )
            service.plan = msgspec.structs.replace(service.plan, policy=compiled)
        opened, service.plan = fallback.first_that_works(
            service.plan, open_first, self._log.warning
        )
        self._backend = lambda: opened
        # Close the backend that is in force at that time; the pool closes earlier ones.
        self._undo.callback(lambda: self._backend().close())

    def start_workers(self, _step: Step) -> None:
        service, backend = self._service, self._backend()
        generation = Generation(1, service.plan)
        preloads = service.plan.service.preload
        if preloads:
            from steer.controller import preload

            # First: it loads the application while the rest of this is done.
            self._undo.callback(preload.begin(service, generation).close)
        self._announce(backend)
        loading.import_for(service.plan.service)
        service.listen()
        self._undo.callback(service.listener.close)
        service.make_guard(None)
        self._undo.callback(service.guard.close)
        backend.open_anchors()
        if backend.backup:
            backend.backup.open()
        service.make_pool(generation, backend)
        self._backend = lambda: service.backend
        self._undo.callback(service.pool.abandon)
        service.persist(generation)
        service.pool.start_queue.is_paused = preloads
        service.pool.start(service.claim.others_may_start)
        service.pool.save()
        # If we are killed before this, the kernel tells the workers to finish, see `lifeline`.
        service.start_guard()

    def _announce(self, backend: Backend) -> None:
        plan, chosen = self._service.plan, self._service.plan.backends[0]
        if plan.service.adopts:
            self._log.info("%s: %s", plan.name, plural(len(plan.specs), "server"))
        else:
            count = plan.number_in_words
            self._log.info("%s: %s, %s on %s", plan.name, count, plan.policy.name, chosen.backend)
        if plan.became:
            self._log.info("policy %s", plan.became)
        if chosen.reason:
            self._log.warning("not on a better backend: %s", chosen.reason)
        if plan.service.spares and not plan.spare_specs:
            self._log.warning("%s", shortfalls.NO_SPARES)
        if backend.write_waiting:
            self._log.warning("%s", backend.notes[-1])
        if as_whom := privileges.note(plan.service):
            self._log.info("%s", as_whom)
        if unreachable := privileges.barriers(plan.service, self._service.environment).note:
            self._log.warning("%s", unreachable)
        for shortfall in sockopt.shortfalls(plan.binds, plan.service.settings):
            self._log.warning("socket option %s", shortfall)
        if chosen.fallback:
            self._log.info("ebpf would add: %s", candidates.EBPF_ADDS)


CARRY_OUT: Mapping[Act, Callable[[Start, Step], None]] = {
    Act.CLAIM: Start.claim_name,
    Act.CHECK_FREE: Start.check_free,
    Act.LOAD: Start.load_policy,
    Act.START: Start.start_workers,
}
