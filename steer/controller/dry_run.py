"""The dry run of `steer check`: tries all steps of a plan that change nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import msgspec

from steer.backends import anchors
from steer.backends.open import open_first
from steer.child import privileges
from steer.config import fallback, servers
from steer.config.plan import Plan
from steer.config.service import Service
from steer.control import taken
from steer.controller.pidfile import check_pid_file
from steer.errors import AppLoadError
from steer.linux import descriptors, fork, identity
from steer.policy.builtin import KERNEL
from steer.policy.layout import Member
from steer.sockets import port_checks, sockopt
from steer.workers import visibility


class DryRun(msgspec.Struct, frozen=True):
    """The result of a dry run.

    Args:
        plan: the plan with the backend that works, and why no better one does.
        notes: shortfalls of the backend, and other facts that the user should know.
        memory_bytes: how much kernel memory the maps take.
    """

    plan: Plan
    notes: Sequence[str]
    memory_bytes: int


def dry_run(plan: Plan, environment: Mapping[str, str]) -> DryRun:
    """Try all steps of a plan that change nothing.

    Raises:
        SteerError: `steer run` would fail with this error.
    """
    import shutil

    service = plan.service
    identity.identity(service.user, service.group)
    descriptors.allow_descriptors(descriptors.open_descriptors() + plan.descriptors)
    if service.chdir is not None and not os.path.isdir(service.chdir):
        raise AppLoadError(f"chdir {service.chdir}", "no such directory")
    if service.command and shutil.which(service.command[0]) is None:
        program = service.command[0]
        raise AppLoadError(f"run {program}", "no such command", fork.venv_hint(program))
    barriers = privileges.barriers(service, environment)
    if barrier := barriers.command:
        raise AppLoadError(f"run {service.command[0]}", str(barrier), barrier.cure)
    taken.refuse_taken(plan.name, service.control_socket, environment)
    if service.pid:
        check_pid_file(service.pid)
    backend, working = fallback.first_that_works(plan, open_first, lambda _: None)
    backend.steer([Member(spec.number, spec.weight, spec.cpu) for spec in plan.specs])
    notes = [*backend.notes, *_notes(service), *filter(None, [barriers.note])]
    if working.backends[0].backend == KERNEL:
        notes += map(str, anchors.notes(plan.binds, {}))
    found = DryRun(working, notes, backend.memory_bytes())
    backend.close()
    for bind in plan.binds:
        port_checks.check_free(bind, service.settings)
    return found


def _notes(service: Service) -> Iterator[str]:
    """Facts that the user should know about a service, and that do not depend on the backend."""
    if as_whom := privileges.note(service):
        yield as_whom
    if service.stop_signal is None and (hint := servers.note(service.command)):
        yield hint
    yield from map(str, sockopt.shortfalls(service.binds, service.settings))
    with suppress(OSError):  # a note that cannot be made is no reason to fail
        yield from visibility.notes_on(visibility.of(service))
