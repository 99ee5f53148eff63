"""The walk down what may be tried: the first policy and backend that works is the one. Pure.

What tries them is handed in: at the start a backend is opened, in a running service workers are
moved to it. So the same words tell why it is no better one, whenever that was decided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from steer.config import auto, candidates
from steer.config.plan import Plan
from steer.errors import CompileError, KernelError, VerifierError

T = TypeVar("T")


def first_that_works(
    plan: Plan, attempt: Callable[[Plan], T], warn: Callable[[str], None]
) -> tuple[T, Plan]:
    """Try the candidates of a plan, and of each its rungs, best first.

    Args:
        attempt: is given a plan with one policy and one rung. Raises KernelError if that does
            not work.
        warn: is told what has failed at some length.

    Returns:
        What `attempt` returned, and the plan that worked. Of what did not, the reasons are in it.

    Raises:
        FallbackRefused: --strict, and none but a fallback works.
        CompileError, VerifierError: a policy of the user's own is not right.
        KernelError: nothing works.
    """
    while True:
        failed: list[tuple[str, KernelError]] = []
        for candidate in plan.backends:
            for other, error in failed:
                candidate = candidates.after(candidate, other, str(error))
            candidates.choose(candidate, plan.service.strict)
            alone = msgspec.structs.replace(plan, backends=(candidate,), others=())
            try:
                return attempt(alone), alone
            except KernelError as error:
                if plan.policy.is_own and isinstance(error, CompileError | VerifierError):
                    raise  # it is not the machine that lacks something
                failed.append((candidate.backend, error))
                if error.detail and not plan.others:
                    warn(f"{error}\n{error.detail}")
        if not plan.others:
            raise _nothing_works(plan, failed)
        following, *rest = plan.others
        plan = plan.choosing_by([auto.instead(following, plan.policy, failed[-1][1]), *rest])


def _nothing_works(plan: Plan, failed: list[tuple[str, KernelError]]) -> KernelError:
    """What failed, if that is one; else all of it in one."""
    if len(failed) == 1:
        return failed[0][1]
    causes = "; ".join(f"{backend}: {error}" for backend, error in failed)
    return KernelError(f"steer by {plan.policy.name}", causes)
