"""What `steer.testing` gives to tests of users' own."""

from __future__ import annotations

from pathlib import Path

import pytest

import steer
from steer.testing import service
from testkit.clients import http_get
from testkit.namespaces import Netns
from testkit.processes import eventually, is_running


def test_service_runs_while_the_block_does(netns: Netns) -> None:
    with service(demo=True, workers=2, policy="round-robin") as running:
        told = running.status()
        assert [worker.state for worker in told.workers] == ["ready", "ready"]
        assert {http_get(*running.address)[1]["slot"] for _ in range(2)} == {0, 1}
        assert running.scale(3).workers == 3
        pids = [told.pid, *(worker.pid for worker in running.status().workers if worker.pid)]
        assert Path(running.control_socket).exists()
    eventually(lambda: not any(map(is_running, pids)))
    assert not Path(running.control_socket).parent.exists()


def test_variables_of_the_environment_do_not_matter(
    netns: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STEER_WORKERS", "WEB_CONCURRENCY"):
        monkeypatch.setenv(name, "7")
        with service(demo=True, workers=1, name="mine") as running:
            assert len(running.status().workers) == 1
            assert running.status().name == "mine"
        monkeypatch.delenv(name)


def test_one_that_does_not_start_says_why(netns: Netns) -> None:
    with pytest.raises(steer.WorkersFailed) as caught, service(app="nowhere:serve"):
        raise AssertionError("not reached")
    assert "ModuleNotFoundError: No module named 'nowhere'" in caught.value.detail


def test_what_cannot_be_is_told_before_anything_starts() -> None:
    with pytest.raises(steer.ConfigError, match="workers = 0"), service(demo=True, workers=0):
        raise AssertionError("not reached")
