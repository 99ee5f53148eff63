"""Which backends, and why: policies × backends asked for × what the probes found × strictness."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest

from steer.config.candidates import BackendCandidate, after, backend_candidates, refuse_fallback
from steer.errors import FallbackRefused
from steer.features import Answer, Finding
from steer.policy.builtin import BACKENDS, POLICIES, Policy

ASKED = ("auto", *BACKENDS)
YES = Finding(Answer.YES)
NO = Finding(Answer.NO, "needs Linux 4.19")
UNKNOWN = Finding(Answer.UNKNOWN, "EPERM")
FOUND: tuple[Mapping[str, Finding], ...] = (
    {},
    *({"ebpf": ebpf, "cbpf": cbpf} for ebpf, cbpf in product((YES, NO, UNKNOWN), repeat=2)),
)
NO_TURNS = "cbpf: classic BPF keeps no state, so it cannot take turns"

hash_, turns, plain = POLICIES["hash"], POLICIES["round-robin"], POLICIES["kernel"]


@pytest.mark.parametrize(
    "policy, asked, ebpf, cbpf, expected",
    [
        (hash_, "auto", YES, YES, [("ebpf", None, 0), ("cbpf", None, 0), ("kernel", None, 0)]),
        (
            hash_,
            "auto",
            NO,
            YES,
            [
                ("cbpf", "ebpf: needs Linux 4.19", 1),
                ("kernel", "ebpf: needs Linux 4.19", 1),
            ],
        ),
        (
            hash_,
            "auto",
            NO,
            NO,
            [("kernel", "ebpf: needs Linux 4.19; cbpf: needs Linux 4.19", 1)],
        ),
        (
            hash_,
            "auto",
            UNKNOWN,
            NO,
            [("ebpf", None, 0), ("kernel", "cbpf: needs Linux 4.19", 1)],
        ),
        (
            hash_,
            "ebpf",
            NO,
            YES,
            [
                ("cbpf", "ebpf: needs Linux 4.19", 1),
                ("kernel", "ebpf: needs Linux 4.19", 1),
            ],
        ),
        (
            hash_,
            "cbpf",
            YES,
            YES,
            [("cbpf", "backend = cbpf", 0), ("kernel", "backend = cbpf", 0)],
        ),
        (
            hash_,
            "cbpf",
            NO,
            NO,
            [("kernel", "backend = cbpf; cbpf: needs Linux 4.19", 1)],
        ),
        (hash_, "kernel", YES, YES, [("kernel", "backend = kernel", 0)]),
        (turns, "auto", YES, YES, [("ebpf", None, 0), ("kernel", NO_TURNS, 1)]),
        (
            turns,
            "auto",
            NO,
            YES,
            [("kernel", f"ebpf: needs Linux 4.19; {NO_TURNS}", 1)],
        ),
        (turns, "cbpf", YES, YES, [("kernel", f"backend = cbpf; {NO_TURNS}", 1)]),
        (plain, "auto", NO, NO, [("kernel", None, 0)]),
        (plain, "ebpf", YES, YES, [("kernel", None, 0)]),
    ],
)
def test_candidates(
    policy: Policy,
    asked: str,
    ebpf: Finding,
    cbpf: Finding,
    expected: list[tuple[str, str | None, int]],
) -> None:
    found = backend_candidates(policy, asked, {"ebpf": ebpf, "cbpf": cbpf})
    assert found == [BackendCandidate(backend, why, bool(less)) for backend, why, less in expected]


every = pytest.mark.parametrize(
    "policy, asked",
    [
        pytest.param(policy, asked, id=f"{policy.name}-{asked}")
        for policy, asked in product(POLICIES.values(), ASKED)
    ],
)


@every
def test_from_the_top_down_all_that_may_hold(policy: Policy, asked: str) -> None:
    """That is what the policy has and no probe ruled out; what was passed over is the reason."""
    top = BACKENDS.index("ebpf" if asked == "auto" else asked)
    for found in FOUND:
        candidates = backend_candidates(policy, asked, found)
        if policy is plain:
            assert candidates == [BackendCandidate("kernel", None, False)]
            continue
        passed = {one for one in BACKENDS if one not in policy.backends or found.get(one) is NO}
        may_hold = [name for name in BACKENDS[top:] if name not in passed]
        assert [candidate.backend for candidate in candidates] == may_hold
        for candidate in candidates:
            over = [b for b in BACKENDS[top : BACKENDS.index(candidate.backend)] if b in passed]
            reasons = candidate.reason.split("; ") if candidate.reason else []
            if asked in ("cbpf", "kernel"):
                assert reasons.pop(0) == f"backend = {asked}"
            assert [reason.partition(":")[0] for reason in reasons] == over
            assert candidate.fallback == bool(over)


@every
def test_strict_refuses_every_fallback_and_nothing_else(policy: Policy, asked: str) -> None:
    for candidate in (
        candidate for found in FOUND for candidate in backend_candidates(policy, asked, found)
    ):
        refuse_fallback(candidate, strict=False)
        if not candidate.fallback:
            refuse_fallback(candidate, strict=True)
            continue
        with pytest.raises(FallbackRefused) as caught:
            refuse_fallback(candidate, strict=True)
        assert caught.value.exit_code == 5
        assert str(caught.value).startswith(
            f"use {candidate.backend}: strict is set, and {candidate.reason}; "
        )


def test_a_backend_that_failed_is_a_reason() -> None:
    _, cbpf, kernel = backend_candidates(hash_, "auto", {})
    assert after(cbpf, "ebpf", "EPERM") == BackendCandidate("cbpf", "ebpf: EPERM", True)
    twice = after(after(kernel, "ebpf", "EPERM"), "cbpf", "ENOMEM")
    assert twice == BackendCandidate("kernel", "ebpf: EPERM; cbpf: ENOMEM", True)
    with pytest.raises(FallbackRefused, match="ebpf: EPERM; cbpf: ENOMEM"):
        refuse_fallback(twice, strict=True)


def test_what_was_asked_for_stays_a_reason() -> None:
    kernel = backend_candidates(hash_, "cbpf", {})[-1]
    assert after(kernel, "cbpf", "ENOMEM").reason == "backend = cbpf; cbpf: ENOMEM"
