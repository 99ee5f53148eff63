"""The ladder: ebpf, cbpf, kernel. Which rung a service stands on, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from steer.errors import FallbackRefused
from steer.features import Answer, Finding
from steer.policy.builtin import BACKENDS, EBPF, KERNEL, Policy


class BackendCandidate(msgspec.Struct, frozen=True):
    """A backend to try.

    Args:
        reason: why no better one is used; None on the best there is for the policy.
        fallback: whether standing here is less than what was asked for.
    """

    backend: str
    reason: str | None
    fallback: bool


EBPF_ADDS = "turns, counters, and queues that outlive their worker"

UNTRIED = Finding(Answer.UNKNOWN, "not tried")


def backend_candidates(
    policy: Policy, asked: str, findings: Mapping[str, Finding]
) -> list[BackendCandidate]:
    """The rungs to try, best first. The last, the kernel's own hash, always holds.

    Args:
        asked: a backend, or "auto" for the best.
        findings: what the probes found, by backend. A rung whose probe could not
            tell is tried all the same: the attempt will.
    """
    if policy.source is None:
        return [BackendCandidate(KERNEL, None, False)]
    top = EBPF if asked == "auto" else asked
    better = () if top == EBPF else (f"--backend {asked}",)
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


def choose(candidate: BackendCandidate, strict: bool) -> BackendCandidate:
    """The rung itself, unless that would be a fallback and none is allowed.

    Raises:
        FallbackRefused
    """
    if strict and candidate.fallback:
        raise FallbackRefused(
            f"use {candidate.backend}",
            f"--strict, and {candidate.reason}",
            "drop --strict, or see `steer doctor`",
        )
    return candidate


def after(candidate: BackendCandidate, failed: str, why: str) -> BackendCandidate:
    """`candidate` with one more reason: that the better one `failed` was tried and did not work."""
    reasons = [*([candidate.reason] if candidate.reason else []), f"{failed}: {why}"]
    return BackendCandidate(candidate.backend, "; ".join(reasons), True)


def _why_not(policy: Policy, backend: str, findings: Mapping[str, Finding]) -> str:
    if backend not in policy.backends:
        return policy.no_cbpf
    finding = findings.get(backend, UNTRIED)
    return str(finding.note) if finding.answer is Answer.NO else ""
