"""Opens a backend, and refuses one that would do only half of what is asked."""

from __future__ import annotations

from steer.backends.base import Backend
from steer.backends.cbpf import Cbpf
from steer.backends.connections import Counting
from steer.backends.ebpf import Ebpf
from steer.backends.kernel import Kernel
from steer.backends.shortfalls import NOT_COUNTED, SAMPLED
from steer.config.plan import Plan
from steer.errors import FallbackRefused, SteerError, Uncounted
from steer.policy import builtin


def open_backend(
    backend: str, plan: Plan, empty: bool = False, before: Backend | None = None
) -> Backend:
    """Open a backend, before it has any socket.

    Args:
        backend: the name of the backend.
        empty: load nothing, because `restore` follows.
        before: the current backend, whose sockets the new one takes over later.

    Raises:
        KernelError: this backend does not work here.
    """
    counting = before.counting if before else None
    if backend == builtin.CBPF:
        return Cbpf(plan, empty)
    if backend == builtin.EBPF:
        return Ebpf(plan, empty, counting)
    return Kernel(plan, empty, counting, before.order if before else ())


def open_first(plan: Plan, before: Backend | None = None) -> Backend:
    """Open the first backend of a plan.

    Args:
        before: see `open_backend`.

    Raises:
        As `open_backend` and `refuse_uncounted`.
    """
    opened = open_backend(plan.backends[0].backend, plan, before=before)
    try:
        refuse_uncounted(plan, opened.counting)
    except SteerError:
        opened.close()
        raise
    return opened


def refuse_uncounted(plan: Plan, counting: Counting | None) -> None:
    """Check that open connections are counted if the policy reads them.

    Raises:
        Uncounted: they are not, and `auto` can select another policy.
        FallbackRefused: they are not, and --strict was given.
    """
    if counting is None or not counting.why_not or not plan.policy.reads_load:
        return
    if plan.policy_reason is not None:
        cause, cure, number = counting.why_not
        raise Uncounted("open connections cannot be counted", cause, cure, errno=number)
    if plan.service.strict:
        raise FallbackRefused(
            f"use {plan.policy.name}",
            f"{NOT_COUNTED}: {counting.why_not}; {SAMPLED}",
            "unset strict, or see `steer doctor`",
        )
