"""What the doctor says after a look at this machine, of which some answers are others."""

from __future__ import annotations

import pytest

from steer import features
from steer.backends.base import Backend
from steer.backends.kernel import Kernel
from steer.config.plan import Plan
from steer.doctor import checks
from steer.doctor import facts as kernel_facts
from steer.doctor import look as looking
from steer.errors import CompileError, KernelError, Uncounted, VerifierError
from steer.features import Answer
from steer.loader import probe
from steer.policy.builtin import EBPF
from testkit.sound_machine import AUTO, EPERM, GOOD, REFUSES, SERVICE


def test_where_nothing_counts_auto_is_hash_and_what_would_count_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def uncounted(plan: Plan) -> Backend:
        if plan.policy.reads_load:
            raise Uncounted("open connections cannot be counted", "EACCES")
        return Kernel(plan)

    monkeypatch.setattr(looking, "open_first", uncounted)
    monkeypatch.setattr(looking, "_can_count", lambda: REFUSES)
    monkeypatch.setitem(probe.PROBES, features.EBPF, lambda: features.Finding(Answer.YES))
    found = {each.topic: each for each in checks.examine(AUTO)}
    assert found["policy"].verdict == "warn"
    assert found["policy"].found == ("auto is hash, as open connections cannot be counted: EACCES")
    assert "CAP_NET_ADMIN" in found["policy"].cure
    assert found["backend"].found == "ebpf"


@pytest.mark.parametrize(
    "error, cure",
    [
        (VerifierError("load program steer_cpu", "EACCES", detail="R0 !read_ok"), "verifier"),
        (
            KernelError("load program steer_cpu", "EPERM", "see `steer doctor`", errno=EPERM),
            "bpf(2)",
        ),
        (CompileError("compile cpu.c", "bcc is not installed", "install it"), "install it"),
    ],
)
def test_a_policy_that_is_refused_is_stepped_down_from(
    monkeypatch: pytest.MonkeyPatch, error: KernelError, cure: str
) -> None:
    def open_first(plan: Plan) -> Backend:
        if plan.backends[0].backend == EBPF:
            raise error
        return Kernel(plan)

    monkeypatch.setattr(looking, "open_first", open_first)
    monkeypatch.setitem(probe.PROBES, features.EBPF, lambda: features.Finding(Answer.YES))
    monkeypatch.setattr(kernel_facts, "read", lambda *_: GOOD)
    found = {each.topic: each for each in checks.examine(SERVICE)}
    assert found["ebpf"].verdict == found["backend"].verdict == "warn"
    assert found["ebpf"].found == f"no: {error.what}: {error.cause}"
    assert found["backend"].found == f"cbpf; ebpf: {error.what}: {error.cause}"
    assert cure in found["backend"].cure
    assert "steer doctor" not in found["backend"].cure
