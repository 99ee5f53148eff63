"""Descriptors, where there are many: those that steer starts with, and those of many binds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from testkit.clients import http_get, udp_ask
from testkit.fixtures import RunSteer, StartService
from testkit.processes import python
from testkit.programs import source
from testkit.service import STEER, Service, launch

INHERITED = 1_100
"""More than select(2) can be asked about."""
BINDS = 300
"""More than one message can carry (SCM_MAX_FD, 253)."""
INHERITS = f"""
import os, resource, sys
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for _ in range({INHERITED}):
    os.set_inheritable(os.dup(0), True)
os.execv(sys.argv[1], sys.argv[1:])
"""
ALL_ANSWER = source("all_answer")


def test_starts_and_ends_with_many_descriptors_inherited(
    netns: object, environment: dict[str, str], home: Path
) -> None:
    inheriting = python(INHERITS, STEER)
    run = (*inheriting, "run", "-w", "2", "--name", "test")
    running = Service(
        launch(run, environment=environment, home=home, records=home),
        "test",
        home,
        home,
        environment,
    )
    try:
        running.wait_ready()
        assert http_get("127.0.0.1", 8080)[1]["name"] == "test"
        worker = running.workers()[0]["pid"]
        assert len(list(Path(f"/proc/{worker}/fd").iterdir())) < 20
        stop = launch(
            (*inheriting, "stop", "test"), environment=environment, home=home, records=home / "run"
        )
        assert stop.wait() == 0, (home / "run" / "stderr").read_text()
        assert running.wait() == 0
    finally:
        running.clean_up()


@pytest.mark.parametrize("backend", ["auto", "cbpf"])
def test_binds_more_than_one_message_can_carry(
    service: StartService, home: Path, backend: str
) -> None:
    (home / "app.py").write_text(ALL_ANSWER)
    ports = range(9_000, 9_000 + BINDS)
    binds = [word for port in ports for word in ("-b", f"udp://127.0.0.1:{port}")]
    running = service(*binds, "-w", "1", "--policy", "hash", "--backend", backend, "app:serve")
    assert running.ask("reload")["generation"] == 2
    assert [udp_ask("127.0.0.1", port)["port"] for port in ports] == list(ports)


def test_check_refuses_what_run_cannot_open(
    steer: RunSteer, environment: Mapping[str, str], home: Path
) -> None:
    """The limit is on what is open in all, so what is inherited counts, too."""
    limited = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    (home / "limited.py").write_text(limited)
    errors = []
    for command in ("check", "run"):
        done = launch(
            (sys.executable, "limited.py", STEER, command, "-w", "40"),
            environment=environment,
            home=home,
            records=home,
        )
        assert done.wait() == 1
        errors.append((home / "stderr").read_text())
    check, run = errors
    assert "files, as so many workers and addresses need: the limit is 400; raise it" in check
    assert check == run
    assert json.loads(steer("check", "-w", "40", "--json").stdout)
