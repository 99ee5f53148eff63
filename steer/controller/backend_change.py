"""Has the workers that there are chosen by another policy, on the same or another backend."""

from __future__ import annotations

from steer.backends.open import open_whole, refuse_uncounted
from steer.config.plan import Plan
from steer.errors import ControlError
from steer.policy.builtin import KERNEL
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool


def move_to(pool: WorkerPool, plan: Plan) -> None:
    """By the policy of this plan, on its first backend.

    Raises:
        SteerError: nothing has changed.
    """
    backend = plan.backends[0].backend
    if backend == pool.backend.name:
        refuse_uncounted(plan, pool.backend.counting)
        pool.switch_policy(plan)
        return
    if backend == KERNEL:
        _see_that_all_serve(pool, plan)
    fresh = open_whole(plan, pool.backend)
    try:
        pool.switch_policy(plan, fresh)
    except BaseException:
        fresh.close()
        raise


def _see_that_all_serve(pool: WorkerPool, plan: Plan) -> None:
    """Raises ControlError: the kernel's own hash would select a worker that is to get nothing."""
    for worker in pool.workers:
        if worker.state in (State.DRAINING, State.HUNG):
            raise ControlError(
                f"change the policy of {plan.name} to {plan.policy.name}",
                f"worker {worker.slot} is {worker.state.value}, and nothing would keep it so",
                "see `steer undrain` and `steer restart`",
            )
