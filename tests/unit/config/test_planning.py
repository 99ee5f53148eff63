"""The plan of a service that is about to start: which policy `auto` becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from steer.config.planning import COUNTED, DATAGRAMS, plan
from steer.config.service import Service
from steer.errors import FallbackRefused
from steer.features import Answer, Finding
from steer.policy.cpus import Topology

FOUR = Topology((0, 1, 2, 3), (0, 1, 2, 3), {})
YES = {"ebpf": Finding(Answer.YES), "cbpf": Finding(Answer.YES)}
NO = Finding(Answer.NO, "EPERM")
UP_TO: dict[str, Mapping[str, Finding]] = {
    "ebpf": YES,
    "cbpf": {**YES, "ebpf": NO},
    "kernel": {"ebpf": NO, "cbpf": NO},
}
"""By the best backend, what the probes find."""


UDP = ("udp://127.0.0.1:1",)
NEEDS_EBPF = "least-conn needs ebpf"


@pytest.mark.parametrize(
    "bind, backend, best, policy, reason, tried",
    [
        (
            (),
            "auto",
            "ebpf",
            "least-conn",
            COUNTED,
            [["ebpf"], ["ebpf", "cbpf", "kernel"]],
        ),
        (
            (),
            "ebpf",
            "ebpf",
            "least-conn",
            COUNTED,
            [["ebpf"], ["ebpf", "cbpf", "kernel"]],
        ),
        ((), "auto", "cbpf", "hash", NEEDS_EBPF, [["cbpf", "kernel"]]),
        ((), "cbpf", "ebpf", "hash", NEEDS_EBPF, [["cbpf", "kernel"]]),
        ((), "auto", "kernel", "hash", NEEDS_EBPF, [["kernel"]]),
        (UDP, "auto", "ebpf", "hash", DATAGRAMS, [["ebpf", "cbpf", "kernel"]]),
        (
            ("127.0.0.1:1", *UDP),
            "auto",
            "ebpf",
            "hash",
            DATAGRAMS,
            [["ebpf", "cbpf", "kernel"]],
        ),
    ],
)
def test_auto_is_by_load_where_that_can_be_counted(
    bind: tuple[str, ...], backend: Any, best: str, policy: str, reason: str, tried: list[list[str]]
) -> None:
    service = Service(bind=bind or ("127.0.0.1:1",), backend=backend)
    made = plan(service, FOUR, UP_TO[best])
    backends = [[each.backend for each in candidate.backends] for candidate in made.candidates]
    assert (made.policy.name, made.policy_reason, backends) == (policy, reason, tried)
    assert made.describe()["policy_asked"] == "auto"
    assert f"auto is {policy}, as {reason}" in made.steps()[1].reason


def test_that_auto_has_become_hash_is_no_fallback_but_a_lower_backend_is() -> None:
    strict = Service(strict=True)
    plan(replace(strict, bind=UDP), FOUR, UP_TO["ebpf"])
    with pytest.raises(FallbackRefused):
        plan(strict, FOUR, UP_TO["cbpf"])
