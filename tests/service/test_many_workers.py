"""A service of 300 real workers is reloaded, scaled and steered anew under load.

Every request is told from all others: each is answered, once, by a worker that then finishes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit.fault_load import PORT, Load, Record, load
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually
from testkit.service import Service

pytestmark = pytest.mark.needs("bpf", "migrate")

WORKERS, FEWER = 300, 270
POLICIES = ("cpu", "least-conn", "round-robin", "source", "hash")
_AT_LEAST = 100
"""Requests that begin and end between two changes, for it to be under load."""


def test_300_workers_lose_nothing(service: StartService, home: Path) -> None:
    record = Record(home)
    arguments = ("-w", str(WORKERS), "-b", f"127.0.0.1:{PORT}", "--policy", "hash", "app:serve")
    # However busy the machine is with other things: new workers are nicer than the service.
    running = service(*arguments, ready=False, under=("nice", "-n", "-15"))
    # By its log: to be asked all the while would take the controller longer than to start them.
    eventually(lambda: running.log.count(" ready\n") >= WORKERS)
    running.wait_ready()
    retired: set[int] = set()
    with load() as asked:
        retired |= _change(running, asked, "reload")
        assert len(retired) == WORKERS
        retired |= _change(running, asked, "scale", workers=FEWER)
        assert len(retired) == WORKERS + WORKERS - FEWER
        retired |= _change(running, asked, "scale", workers=WORKERS)
        for policy in POLICIES:
            retired |= _change(running, asked, "policy", policy=policy)
        assert len(retired) == WORKERS + WORKERS - FEWER
        asked.end(DEADLINE_S)
    _lost_nothing(running, asked, record)
    eventually(record.ended, retired)
    status = running.status()
    assert status["generation"] == 2
    assert [each["state"] for each in status["workers"]] == ["ready"] * WORKERS
    assert [each["restarts"] for each in status["workers"]] == [0] * WORKERS
    assert (status["policy"], status["backend"]) == ("hash", "ebpf")


def _change(running: Service, asked: Load, command: str, **more: object) -> set[int]:
    """Who has gone or goes for it; requests come before, meanwhile and after it."""
    before = _serving(running)
    made = len(asked.requests)
    eventually(lambda: len(asked.requests) >= made + _AT_LEAST)
    running.ask(command, timeout_s=None, **more)
    return before - _serving(running)


def _serving(running: Service) -> set[int]:
    workers = running.ask("status", timeout_s=None)["service"]["workers"]
    return {each["pid"] for each in workers if each["state"] == "ready"}


def _lost_nothing(running: Service, asked: Load, record: Record) -> None:
    assert [each for each in asked.requests if each.error] == []
    assert asked.waiting == {}
    answered = sorted(record.answered())
    assert answered == sorted((each.number, each.pid) for each in asked.requests)
    totals = running.status()["totals"]
    assert (totals["selected"], totals["fallback"]) == (asked.made, 0)
