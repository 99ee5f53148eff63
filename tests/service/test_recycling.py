"""Workers that use too much memory, or have run for long enough, are replaced."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source
from testkit.service import Service

PORT = 8080


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(source("grows"))


def grow(mib: int) -> int:
    """Returns the pid of the worker whose memory has grown."""
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        sock.sendall(f"{mib}\n".encode())
        return int(sock.makefile().readline())


def pids(running: Service) -> set[int]:
    return {each["pid"] for each in running.workers() if each["state"] == "ready"}


def recycled(running: Service) -> dict[str, int]:
    found: dict[str, int] = running.status()["recycled"]
    return found


def test_worker_that_uses_too_much_memory(service: StartService) -> None:
    running = service("app:serve", "-w", "2", "--policy", "round-robin", "--max-memory", "200M")
    before = pids(running)
    large = grow(200)
    eventually(lambda: recycled(running), {"memory": 1})
    eventually(lambda: large not in pids(running) and len(pids(running)) == 2)
    assert before - {large} < pids(running)
    assert "more than 200 MiB; replacing it" in running.log
    assert all(each["restarts"] == 0 for each in running.workers())


def test_workers_that_have_run_for_long_enough_are_replaced_one_at_a_time(
    service: StartService,
) -> None:
    """Another one is ready before one leaves, so there are always at least two."""
    running = service("app:serve", "-w", "2", "--policy", "round-robin", "--max-lifetime", "1s")
    before, fewest = pids(running), 2

    def are_replaced() -> bool:
        nonlocal fewest
        there = pids(running)
        fewest = min(fewest, len(there))
        grow(0)
        return not before & there and recycled(running)["lifetime"] >= 2

    eventually(are_replaced)
    assert fewest == 2


def test_limit_comes_with_a_reload(service: StartService, home: Path) -> None:
    file = home / "steer.toml"
    file.write_text('[service]\napp = "app:serve"\nworkers = 1\n')
    running = service("--config", str(file))
    file.write_text('[service]\napp = "app:serve"\nworkers = 1\nmax_lifetime = 1\n')
    running.ask("reload")
    eventually(lambda: recycled(running).get("lifetime"))


def test_replacement_that_fails_is_not_repeated_at_once(service: StartService, home: Path) -> None:
    running = service("app:serve", "-w", "1", "--policy", "hash", "--max-lifetime", "1s")
    (worker,) = pids(running)
    (home / "app.py").write_text("raise RuntimeError('broken by now')\n")
    eventually(lambda: "broken by now" in running.log)
    assert pids(running) == {worker}
    assert recycled(running) == {}
    assert running.log.count("replacing it") == 1
