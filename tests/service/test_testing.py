"""What `steer.testing` gives to tests of users' own."""

from __future__ import annotations

import time
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


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "udp://127.0.0.1:0"])
def test_port_0_is_a_free_port(netns: Netns, bind: str) -> None:
    with service(demo=True, workers=1, bind=bind) as one:
        (found,) = one.status().binds
        assert (found.address, found.port) == one.address
        assert found.protocol == ("udp" if "udp" in bind else "tcp")
        with service(demo=True, workers=1, bind=[bind, "[::1]:0"]) as other:
            assert (
                len({one.address, *((each.address, each.port) for each in other.status().binds)})
                == 3
            )


def test_it_does_not_wait_for_an_app_that_ignores_its_end(netns: Netns, tmp_path: Path) -> None:
    """The service is told to end when the block is left; 30 s are the default elsewhere."""
    (tmp_path / "stubborn.py").write_text(
        "import signal\n"
        "def serve(worker):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    worker.ready()\n"
        "    while True:\n"
        "        signal.pause()\n"
    )
    with service(app="stubborn:serve", workers=1, chdir=str(tmp_path)) as running:
        began_s = time.monotonic()
        assert running.status().workers[0].state == "ready"
    assert time.monotonic() - began_s < 15


def test_one_that_does_not_start_says_why(netns: Netns) -> None:
    with pytest.raises(steer.WorkersFailed) as caught, service(app="nowhere:serve"):
        raise AssertionError("not reached")
    assert "ModuleNotFoundError: No module named 'nowhere'" in caught.value.detail


def test_what_cannot_be_is_told_before_anything_starts() -> None:
    with pytest.raises(steer.ConfigError, match="workers = 0"), service(demo=True, workers=0):
        raise AssertionError("not reached")
