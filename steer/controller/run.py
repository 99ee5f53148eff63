"""Runs a service: starts it or adopts it from an earlier controller, then runs the loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from steer.config.plan import Plan
from steer.config.planning import plan
from steer.config.service import Service
from steer.control import rundir, taken
from steer.controller.controller import Controller, Reread
from steer.controller.loop_import import await_loop
from steer.controller.own_listeners import OwnListeners
from steer.controller.start import Start
from steer.errors import KernelError, in_words
from steer.guard.handover import Handover, adopt
from steer.linux import family, fork, output, services, signals, title, topology
from steer.linux.log import Log
from steer.loader import find, probe

_LAST_LINES_S = 1.0
"""How long the reader of our standard error gets to read the last lines when we end."""


def run(
    service: Service,
    environment: Mapping[str, str],
    log: Log,
    reread: Reread,
    *,
    is_in_program: bool = False,
    own_listeners: OwnListeners | None = None,
) -> int:
    """Run a service until it is told to end.

    Args:
        reread: reads the configuration again, for a reload.
        is_in_program: whether a program called `steer.run` in this process. It may have children
            of its own, and may go on afterwards.
        own_listeners: what is done about listeners that workers open themselves.

    Returns:
        The exit status.

    Raises:
        SteerError: the service could not be started.
    """
    if service.reload_on_change:
        from steer.controller.reload_on_change import refuse_missing

        refuse_missing(service)
    # An error in the file of a custom policy does not matter yet: if the service is adopted, the
    # policy is loaded already.
    policy = find.find_or_problem(service.policy)
    decided = plan(service, topology.read(), probe.findings_before_start(), policy)
    try:
        controller = Controller(decided, environment, log, reread, is_in_program, own_listeners)
        return _run(controller)
    finally:
        output.stderr.finish(_LAST_LINES_S)
        output.stderr.close()


def _run(service: Controller) -> int:
    # From here on signals wait until the loop handles them.
    signals.hold_signals()
    title.show(f"steer: controller {service.plan.name}")
    fork.rename("steer")  # `python -m steer` starts as "python"
    family.become_subreaper(service.is_in_program)
    with ExitStack() as undo:
        undo.callback(service.file_limit.spare.close)
        _start_or_adopt(service, undo)
        from steer.controller.loop import supervise

        if supervise(service):
            undo.pop_all()
            _reexecute(service)
    service.log.info("ended")
    return 0


def _start_or_adopt(service: Controller, undo: ExitStack) -> None:
    """Adopt the service if an earlier controller left one, else start it. Raises SteerError: that
    failed."""
    lost, left = _find_handover(service.plan, service.environment)
    if left is not None:
        from steer.controller.adoption import adopt

        adopt(service, *left, undo)
        return
    if service.plan.policy.problem is not None:
        raise service.plan.policy.problem
    Start(service, lost, undo).carry_out()
    runs_command = bool(service.plan.service.command)
    service.early_notifications += await_loop(
        service.listener, service.pool, runs_command=runs_command
    )


def _find_handover(
    plan: Plan, environment: Mapping[str, str]
) -> tuple[Sequence[services.Running], tuple[Path, Handover] | None]:
    """What an earlier controller of this service left.

    Returns:
        Running services of this name whose control socket was removed, see `taken.await_guard`; and
        the path of the control socket with the handover of its guard, or None if there is no guard.

    Raises:
        ControlError: the earlier controller is still running.
    """
    paths = rundir.control_socket_paths(plan.name, plan.service.control_socket, environment)
    lost = taken.await_guard(paths, environment)
    for path in paths:
        # A service of another user is not adopted. `Claim` reports it if it leaves us no path.
        handover = adopt(path) if os.access(path, os.W_OK) else None
        if handover is not None:
            return lost, (path, handover)
    return lost, None


def _reexecute(service: Controller) -> NoReturn:
    """Execute the installed version of steer in this process. It adopts the workers from the guard.

    Raises:
        KernelError: the kernel refuses.
    """
    service.file_limit.put_back()
    service.pool.save()
    for worker in service.pool.workers:
        if worker.process:
            worker.process.pass_rest_on()
    output.stderr.finish(_LAST_LINES_S)
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        cure = "start it again: `steer run` adopts the workers"
        cause = in_words(error)
        raise KernelError.from_oserror("re-execute", error, cure=cure, cause=cause) from None
