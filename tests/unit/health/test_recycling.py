"""Which workers are replaced for what they have used."""

from __future__ import annotations

import pytest

from steer.config.service import Service
from steer.health.recycling import Use, why_due

MIB = 1 << 20


@pytest.mark.parametrize(
    ("service", "use", "limit"),
    [
        (Service(), Use(1e6, 1 << 40), None),
        (Service(max_memory="64M"), Use(1e6, 64 * MIB), None),
        (Service(max_memory="64M"), Use(0.0, 64 * MIB + 1), "memory"),
        (Service(max_memory="64M"), Use(0.0, None), None),
        (Service(max_lifetime=60.0), Use(60.0, None), None),
        (Service(max_lifetime=60.0), Use(60.1, None), "lifetime"),
        (Service(max_memory="64M", max_lifetime=60.0), Use(61.0, 65 * MIB), "memory"),
        (Service(), Use(0.0, None, asks=True), "asked"),
    ],
)
def test_limit_that_a_worker_exceeds(service: Service, use: Use, limit: str | None) -> None:
    found = why_due(service, use, 0.5)
    assert (found and found[0]) == limit


def test_lifetime_of_each_worker_deviates() -> None:
    service = Service(max_lifetime="60±10")
    assert why_due(service, Use(51.0, None), 0.0)
    assert not why_due(service, Use(69.0, None), 1.0)


def test_reason_is_in_words() -> None:
    service = Service(max_memory="64M", max_lifetime=60.0)
    assert why_due(service, Use(0.0, 100 * MIB), 0.5) == (
        "memory",
        "it uses 100 MiB, more than 64 MiB",
    )
    assert why_due(service, Use(61.0, 0), 0.5) == ("lifetime", "it has run for 61 s")
