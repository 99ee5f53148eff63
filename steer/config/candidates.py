"""Candidates: the policies and backends that a service may use, best first, with reasons. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from steer.errors import FallbackRefused, KernelError, Uncounted
from steer.features import Answer, Finding
from steer.policy.builtin import BACKENDS, EBPF, KERNEL, Policy


class BackendCandidate(msgspec.Struct, frozen=True):
    """A backend to try.

    Args:
        reason: why no better backend is used; None: there is no better one for the policy.
        fallback: whether this backend can do less than the one that was asked for.
    """

    backend: str
    reason: str | None
    fallback: bool


class PolicyCandidate(msgspec.Struct, frozen=True):
    """A policy to try.

    Args:
        params: the values of its parameters, in the order in which it declares them.
        reason: why `auto` becomes this policy; None: the user named the policy.
        backends: the backends to try, best first. If none works, the next policy is tried. The last
            policy has the kernel's own hash as its last backend, which always works.
        is_uncounted: whether `auto` becomes this policy because connections cannot be counted.
    """

    policy: Policy
    params: tuple[int, ...]
    reason: str | None
    backends: tuple[BackendCandidate, ...]
    is_uncounted: bool = False


EBPF_ADDS = "turns, counters, and queues that outlive their worker"

UNTRIED = Finding(Answer.UNKNOWN, "not tried")


def backend_candidates(
    policy: Policy, wanted: str, findings: Mapping[str, Finding]
) -> list[BackendCandidate]:
    """The backends to try for a policy, best first. The last one, the kernel's own hash, always
    works.

    Args:
        wanted: a backend, or "auto" for the best.
        findings: what the probes found, by backend. If a probe could not tell whether a backend
            works, the backend is a candidate: an attempt to use it will tell.
    """
    if policy.source is None:
        return [BackendCandidate(KERNEL, None, False)]
    top = EBPF if wanted == "auto" else wanted
    better = () if top == EBPF else (f"backend = {wanted}",)
    reasons = list(better)
    found: list[BackendCandidate] = []
    for backend in BACKENDS[BACKENDS.index(top) :]:
        why_not = _why_not(policy, backend, findings)
        if why_not:
            reasons.append(f"{backend}: {why_not}")
            continue
        fallback = len(reasons) > len(better)
        found.append(BackendCandidate(backend, "; ".join(reasons) or None, fallback))
    return found


def refuse_fallback(candidate: BackendCandidate, strict: bool) -> None:
    """Raises FallbackRefused: the candidate is a fallback, and `strict` allows none."""
    if strict and candidate.fallback:
        raise FallbackRefused(
            f"use {candidate.backend}",
            candidate.reason or "",
            "unset strict, or see `steer doctor`",
        )


def after(candidate: BackendCandidate, failed: str, why: str) -> BackendCandidate:
    """The candidate, with one more reason: the better backend `failed` did not work."""
    reasons = [*([candidate.reason] if candidate.reason else []), f"{failed}: {why}"]
    return BackendCandidate(candidate.backend, "; ".join(reasons), True)


def instead(candidate: PolicyCandidate, of: Policy, error: KernelError) -> PolicyCandidate:
    """The candidate, with the reason that `auto` becomes it because the policy `of` failed."""
    is_uncounted = isinstance(error, Uncounted)
    why_not = str(error) if is_uncounted else f"{of.name}: {error}"
    return msgspec.structs.replace(candidate, reason=why_not, is_uncounted=is_uncounted)


def with_reason(candidate: PolicyCandidate, reason: str) -> PolicyCandidate:
    """The candidate, with the reason why `auto` becomes it."""
    return msgspec.structs.replace(candidate, reason=reason)


def _why_not(policy: Policy, backend: str, findings: Mapping[str, Finding]) -> str:
    if backend not in policy.backends:
        return policy.no_cbpf
    finding = findings.get(backend, UNTRIED)
    return str(finding.note) if finding.answer is Answer.NO else ""
