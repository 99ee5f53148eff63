"""What a service tells whoever supervises it, as systemd does."""

from __future__ import annotations

import os

import pytest

from steer.controller import state
from steer.controller.state import ServiceState

HERE = {"NOTIFY_SOCKET": "@here"}


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(
        state, "notify_supervisor", lambda message, where: lines.append(message) or where
    )
    return lines


def test_a_service_starts_runs_and_stops(told: list[str]) -> None:
    service = ServiceState(HERE)
    words = [service.name]
    service.set_running()
    words.append(service.name)
    service.set_stopping()
    words.append(service.name)
    assert words == ["starting", "running", "stopping"]
    assert told == [f"READY=1\nMAINPID={os.getpid()}", "STOPPING=1"]


def test_a_reload_ends_in_ready(told: list[str]) -> None:
    service = ServiceState(HERE)
    service.set_running()
    with service.reloading():
        assert told[-1].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert told[-1] == "READY=1"


def test_one_that_stops_meanwhile_is_not_ready_again(told: list[str]) -> None:
    service = ServiceState(HERE)
    service.set_running()
    with service.reloading():
        service.set_stopping()
    assert told[-1] == "STOPPING=1"
