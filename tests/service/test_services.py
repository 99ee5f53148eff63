"""Services that are found by their processes: wherever they listen, and also while the path of
their control socket is gone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from steer.control import rundir
from steer.linux import services
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.processes import eventually, stopped
from testkit.service import Service, lose_directory

pytestmark = pytest.mark.needs("netns")


def test_services_are_found_wherever_they_listen(
    service: StartService, home: Path, steer: RunSteer
) -> None:
    (home / "a b").mkdir()
    usual = service("-w", "1", name="usual")
    for name, port, path in (("one", 8081, "a b/x"), ("two", 8082, str(home / "two.sock"))):
        service(
            "-w", "1", "-b", f"127.0.0.1:{port}", "--control-socket", path, name=name, ready=False
        )
    eventually(lambda: sorted(names(usual)), ["one", "two", "usual"])
    asked = steer("reload")
    assert asked.returncode == 1
    assert "several are running: usual, " in asked.stderr
    assert steer("scale", "one", "2").stdout.startswith("scaled one: 2 workers")
    for name in ("one", "two", "usual"):
        assert steer("stop", name).stdout == f"stopped {name}\n"


def test_those_that_are_known_are_passed_over(
    service: StartService, environment: dict[str, str]
) -> None:
    """With their guards: they have as much open as there are workers."""
    running = service("-w", "1")
    assert [each.pid for each in services.find(environment)] == [running.pid]
    assert services.find(environment, {running.pid}) == []
    assert services.unattended(environment) == []


def names(running: Service) -> list[str]:
    told = json.loads(running.steer("status", "--json").stdout)
    return [each["name"] for each in told["services"]]


def test_two_of_a_name_are_told_apart_by_their_sockets(
    service: StartService, home: Path, steer: RunSteer
) -> None:
    paths = [home / "1.sock", home / "2.sock"]
    for number, path in enumerate(paths):
        at = ("-b", f"127.0.0.1:{8081 + number}")
        service("-w", "1", *at, "--control-socket", str(path), ready=False)
        eventually(path.exists)
    asked = steer("stop", "test")
    assert asked.returncode == 1
    assert "several of that name are running" in asked.stderr
    assert all(str(path) in asked.stderr for path in paths)
    for path in paths:
        assert steer("stop", "--control-socket", str(path)).returncode == 0


def test_one_that_was_started_with_another_run_directory(
    service: StartService, environment: dict[str, str]
) -> None:
    """Found by who has none in their environment; who has one looks there and nowhere else."""
    running = service("-w", "1")
    theirs = environment["STEER_RUNTIME_DIR"]
    without = {**environment, "XDG_RUNTIME_DIR": "/nowhere"}
    del without["STEER_RUNTIME_DIR"]
    running.environment = without
    assert "test" in names(running)
    running.environment = {**environment, "STEER_RUNTIME_DIR": theirs + "-of-others"}
    assert names(running) == []


@pytest.mark.needs("nobody")
def test_those_of_other_users_are_left_to_them(
    service: StartService, home: Path, steer: RunSteer
) -> None:
    path = home / "root.sock"
    service("-w", "1", "--control-socket", str(path), ready=False)
    eventually(path.exists)
    assert steer("status", "test", user=NOBODY).returncode == 1
    assert steer("status", "test").returncode == 0


# While it is gone


def test_one_that_cannot_be_found_now_keeps_its_name(service: StartService) -> None:
    first = service("-w", "1")
    with stopped(first.pid):
        lose_directory(first)
        second = service("-w", "1", "-b", "127.0.0.1:8099", ready=False)
        assert second.wait() == 1
        assert f"one of that name is running (pid {first.pid}, " in second.log
    eventually(lambda: first.steer("status", "test").returncode, 0)


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("user", [None, NOBODY])
def test_ones_own_is_not_taken_for_that_of_other_users(
    service: StartService, home: Path, steer: RunSteer, user: int | None
) -> None:
    running = service("-w", "1", user=user)
    with stopped(running.pid):
        lose_directory(running)
        asked = steer("stop", "test", user=user)
        assert (asked.returncode, "other users" in asked.stderr) == (1, False)
        assert f"test.sock was removed, and is not made again; is pid {running.pid}" in asked.stderr
        told = json.loads(steer("status", "--json", user=user).stdout)
        assert (told["others"], [each["name"] for each in told["orphaned"]]) == (0, ["test"])
    eventually(lambda: steer("status", "test", user=user).returncode, 0)


@pytest.mark.parametrize("prefix, is_found", [("mine-", True), ("steer-", False)])
def test_directory_of_ones_own_below_tmp_is_looked_in(prefix: str, is_found: bool) -> None:
    """Only its name tells that it is to be somebody's; without one there is nothing to check."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp") as directory:
        control = Path(directory, "web.sock")
        control.touch()
        found = rundir.find({"STEER_RUNTIME_DIR": directory}, "web")
        assert found == [control] * is_found
