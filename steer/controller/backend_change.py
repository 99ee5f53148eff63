"""Switches the workers of a running service to another policy, on the same or another backend."""

from __future__ import annotations

from steer.backends.open import open_first, refuse_uncounted
from steer.config.plan import Plan
from steer.errors import ControlError
from steer.policy.builtin import KERNEL
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool


def move_to(pool: WorkerPool, plan: Plan) -> None:
    """Switch all workers to the policy of a plan, on the first backend of the plan.

    Raises:
        SteerError: nothing has changed.
    """
    backend = plan.backends[0].backend
    if backend == pool.backend.name:
        refuse_uncounted(plan, pool.backend.counting)
        pool.switch_policy(plan)
        return
    if backend == KERNEL:
        _refuse_drained_or_hung(pool, plan)
    fresh = open_first(plan, pool.backend)
    try:
        pool.switch_policy(plan, fresh)
    except BaseException:
        fresh.close()
        raise


def _refuse_drained_or_hung(pool: WorkerPool, plan: Plan) -> None:
    """See that no worker is draining or hung. Raises ControlError: one is, and the kernel's own
    hash would select it."""
    for worker in pool.workers:
        if worker.state in (State.DRAINING, State.HUNG):
            raise ControlError(
                f"change the policy of {plan.name} to {plan.policy.name}",
                f"worker {worker.slot} is {worker.state.value}, and the kernel would select it",
                "see `steer undrain` and `steer restart`",
            )
