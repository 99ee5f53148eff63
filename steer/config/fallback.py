"""Finds the first policy and backend of a plan that works. Pure.

The caller says how to try one: a start opens a backend, and a running service moves its workers to
it. So the reasons for a fallback read the same in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from steer.config import candidates
from steer.config.plan import Plan
from steer.errors import CompileError, KernelError, VerifierError

T = TypeVar("T")


def first_that_works(
    plan: Plan, attempt: Callable[[Plan], T], warn: Callable[[str], None]
) -> tuple[T, Plan]:
    """Try each policy of a plan on each of its backends, best first.

    Args:
        attempt: tries a plan with one policy and one backend. It raises KernelError if that does
            not work.
        warn: logs an error with its detail.

    Returns:
        The result of `attempt`, and the plan that worked. The plan says why nothing better works.

    Raises:
        FallbackRefused: --strict, and only a fallback may work.
        CompileError, VerifierError: a custom policy has an error.
        KernelError: nothing works.
    """
    while True:
        failed: list[tuple[str, KernelError]] = []
        for candidate in plan.backends:
            for other, error in failed:
                candidate = candidates.after(candidate, other, str(error))
            candidates.refuse_fallback(candidate, plan.service.strict)
            alone = msgspec.structs.replace(plan, backends=(candidate,), others=())
            try:
                return attempt(alone), alone
            except KernelError as error:
                if plan.policy.is_custom and isinstance(error, CompileError | VerifierError):
                    raise  # another backend would not help
                failed.append((candidate.backend, error))
                if error.detail and not plan.others:
                    warn(f"{error}\n{error.detail}")
        if not plan.others:
            raise _nothing_works(plan, failed)
        following, *rest = plan.others
        plan = plan.with_candidates(
            [candidates.instead(following, plan.policy, failed[-1][1]), *rest]
        )


def _nothing_works(plan: Plan, failed: list[tuple[str, KernelError]]) -> KernelError:
    """The only error, or one error that names all of them."""
    if len(failed) == 1:
        return failed[0][1]
    causes = "; ".join(f"{backend}: {error}" for backend, error in failed)
    return KernelError(f"steer by {plan.policy.name}", causes)
