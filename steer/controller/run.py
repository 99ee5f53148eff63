"""Runs a service: carries out its plan, or adopts what another controller left, then the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from steer.config.plan import Act, Plan, Step
from steer.controller.controller import LAST_LINES_S, Controller, Reread
from steer.linux import family, fork, output, title
from steer.linux.log import Log

CARRY_OUT: dict[Act, Callable[[Controller, Step], None]] = {
    Act.CLAIM: Controller.claim_name,
    Act.CHECK_FREE: Controller.check_free,
    Act.LOAD: Controller.load_policy,
    Act.START: Controller.start_workers,
}


def run(plan: Plan, environment: Mapping[str, str], log: Log, reread: Reread) -> int:
    """Run a service until it is told to end.

    Returns:
        The exit status.

    Raises:
        SteerError: it could not be started.
    """
    try:
        return _run(plan, environment, log, reread)
    finally:
        output.stderr.finish(LAST_LINES_S)


def _run(plan: Plan, environment: Mapping[str, str], log: Log, reread: Reread) -> int:
    # From here on a signal waits until the loop can take it.
    fork.hold_signals()
    title.show(f"steer: controller {plan.name}")
    fork.rename("steer")  # started by `python -m steer` it is "python"
    family.become_subreaper()
    with ExitStack() as undo:
        started = Controller(plan, environment, log, reread, undo)
        if not started.adopt():
            if plan.policy.problem is not None:
                raise plan.policy.problem
            for step in plan.steps():
                CARRY_OUT[step.act](started, step)
            started.await_loop()
        from steer.controller.loop import supervise

        if supervise(started):
            undo.pop_all()
            started.execute_anew()
    log.info("ended")
    return 0
