"""How long the controller's loop is busy at a time."""

from __future__ import annotations

from testkit.fixtures import StartService


def test_status_has_them(service: StartService) -> None:
    found = service("--demo", "--workers", "1").status()["loop_delay_ms"]
    assert found["count"] == sum(count for _, count in found["buckets"]) > 0
    assert 0 < found["p50"] <= found["p99"] <= found["p99_9"] <= found["max"]
