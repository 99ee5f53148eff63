"""Adopts a service whose controller is gone: takes over its workers from the guard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec

from steer.backends.base import Backend
from steer.backends.open import open_backend
from steer.config import plan_change
from steer.config.plan import Generation, Plan
from steer.control.claim import Claim
from steer.control.notification_buffer import decoded
from steer.controller import persisted
from steer.controller.controller import Controller
from steer.controller.persisted import Persisted
from steer.errors import KernelError
from steer.guard.handover import Handover
from steer.loader import find
from steer.policy.builtin import AUTO
from steer.values import plural


def adopt(service: Controller, path: Path, handover: Handover, undo: ExitStack) -> None:
    """Adopt a service.

    Args:
        service: a controller that has no parts yet; they are made from the handover.
        path: the path of the control socket.
        undo: gets what has to be undone at the end.

    Raises:
        ControlError: another version of steer stored what the guard hands over.
        ConfigError: the configuration cannot change from the one that the service runs with to ours
            while it runs.
        KernelError: the kernel refuses.
    """
    name = service.plan.name
    try:
        _adopt(service, path, handover, undo)
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
        how = f"{type(error).__name__}: {error}"
        raise persisted.other_version(name, how) from None


def _adopt(service: Controller, path: Path, handover: Handover, undo: ExitStack) -> None:
    saved = Persisted(service.plan.name, handover.entries)
    generations = _generations(service, saved)
    in_force = generations[saved.service.generation]
    service.started_s = saved.service.started_s
    service.claim = Claim.inherited(path, handover.control, handover.settings.remove_directory)
    backend = _open(saved.service.backend.backend, service.plan)
    service.listen(saved.service.notify, saved.notifications.fds[0])
    service.make_guard(handover)
    service.start_guard()
    service.make_pool(in_force, backend)
    service.pool.adopt(generations, saved.service.activated, saved.workers, saved.selection)
    for worker in service.pool.workers:
        service.persist_generation(worker.generation)
    service.persist(in_force)
    service.early_notifications += service.listener.read(decoded(saved.notifications.value))
    remove_pid = service.write_pid()
    handover.taken(service.guard)
    # Only now: if a step above had failed, the old guard would still have all of this.
    undo.callback(service.claim.release)
    undo.callback(remove_pid)
    undo.callback(lambda: service.backend.close())
    undo.callback(service.listener.close)
    undo.callback(service.guard.close)
    undo.callback(service.pool.abandon)
    if in_force.plan.service.preload:
        from steer.controller import preload

        # Only the controller that started a template process becomes the parent of its workers.
        undo.callback(preload.begin(service, in_force).close)
    living = sum(worker.process is not None for worker in service.pool.workers)
    service.log.info("adopted %s", plural(living, "worker"))


def _open(backend: str, plan: Plan) -> Backend:
    """Open the backend of the service. Raises KernelError: it cannot be opened, for example because
    this controller has fewer privileges than the one before."""
    try:
        return open_backend(backend, plan, empty=True)
    except KernelError as error:
        act, why = f"adopt {plan.name}", f"its workers are steered by {backend}: {error}"
        cure = f"run it with the same privileges, or `steer stop {plan.name}` first"
        raise KernelError(act, why, cure) from None


def _generations(service: Controller, saved: Persisted) -> Mapping[int, Generation]:
    """The generations that workers may belong to, by number.

    Sets `service.plan` to the plan in force. If our own plan differs from it, sets
    `service.pending_plan` to our plan, for a reload.
    """
    ours, act = service.plan, f"adopt {service.plan.name}"
    running = _plan_in_force(ours, saved)
    # All generations have the policy in force, as a service has only one.
    chosen = {"policy": running.service.policy, "params": running.service.params}
    found = {
        number: Generation(
            number,
            plan_change.reloaded(
                running, msgspec.structs.replace(each, **chosen), ours.topology, act
            ),
        )
        for number, each in saved.generations.items()
    }
    service.plan = found[saved.service.generation].plan
    service.configured = saved.service.configured
    # A policy that `steer policy` has set is kept; an edit of the policy's file is a change.
    is_edited = running.policy.source == ours.policy.source and running.policy != ours.policy
    if ours.policy.problem is not None:
        service.log.error("%s; the service keeps its configuration", ours.policy.problem)
    elif service.configured != ours.service or is_edited:
        service.pending_plan = plan_change.reloaded(
            running, ours.service, ours.topology, act, ours.candidates
        )
    return found


def _plan_in_force(ours: Plan, saved: Persisted) -> Plan:
    """The plan that the service runs by: our own plan with the stored values."""
    stored, in_force = saved.service, saved.generations[saved.service.generation]
    named = stored.policy if in_force.policy == AUTO else in_force.policy
    return msgspec.structs.replace(
        ours,
        service=in_force,
        policy=find.restore(named, stored.declared, stored.digest),
        policy_reason=stored.policy_reason,
        others=(),
        slots=stored.slots,
        hash_length=stored.hash_length,
        backends=(stored.backend,),
    )
