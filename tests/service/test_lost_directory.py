"""The run directory goes, as at a logout, whatever the service is at."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from steer.control import peer, record
from steer.control.claim import _TURN_S, Claim, record_of
from steer.errors import ControlError
from steer.linux import processes, title
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually, stopped
from testkit.service import STEER, Service, lose_directory, wound

pytestmark = pytest.mark.needs("netns")
SOON = wound("steer.controller.upkeep._LOOK_S=0.2", "steer.guard.control_socket._LOOK_S=0.2")


def guard_of(running: Service) -> int:
    workers = {each["pid"] for each in running.workers()}
    (guard,) = set(processes.children(running.pid)) - workers
    return guard


def orphan(running: Service) -> int:
    """Kill the controller; the guard."""
    guard = guard_of(running)
    running.send_signal(signal.SIGKILL)
    running.wait()
    return guard


def orphaned(running: Service) -> list[str]:
    told = json.loads(running.steer("status", "--json").stdout)
    return [each["state"] for each in told["orphaned"]]


def wait_for(running: Service, words: str, times: int) -> None:
    eventually(lambda: running.log.count(words), times)


# Without a controller


def test_guard_makes_the_control_socket_and_the_record_again(service: StartService) -> None:
    running = service("-w", "2", "--adopt-timeout=300", under=SOON)
    orphan(running)
    before = record.living(running.control_socket)
    assert len(before) == 2
    for again in (1, 2):
        lose_directory(running)
        wait_for(running, "was removed; now it is", again)
        (state,) = orphaned(running)
        assert "2 workers still serving" in state
    eventually(lambda: sorted(record.living(running.control_socket)), sorted(before))
    assert running.steer("stop", "test").returncode == 0
    assert not running.control_socket.parent.exists()


def test_guard_tries_again_until_there_is_a_place(service: StartService) -> None:
    running = service("-w", "1", "--adopt-timeout=300", under=SOON)
    orphan(running)
    above = running.control_socket.parents[1]
    shutil.rmtree(above)
    eventually(lambda: "make the control socket again" in running.log)
    above.mkdir()
    eventually(lambda: "still serving" in running.steer("status", "test").stderr)
    assert running.log.count("make the control socket again") == 1
    service("-w", "1")
    assert orphaned(running) == []


def test_adoption_waits_until_the_guard_can_be_found(service: StartService) -> None:
    first = service("-w", "2", "--adopt-timeout=300", under=SOON)
    workers = {each["pid"] for each in first.workers()}
    guard = orphan(first)
    with stopped(guard):
        lose_directory(first)
        second = service("-w", "2", "--adopt-timeout=300", ready=False)
        # It holds its signals, and has not got on for the guard.
        eventually(lambda: title.of(second.pid), title.Title(title.CONTROLLER, "test"))
    second.wait_ready()
    assert {each["pid"] for each in second.workers()} == workers
    assert "adopted 2 workers" in second.log


def test_what_executes_itself_anew_is_not_lost(service: StartService) -> None:
    running = service("-w", "2", under=SOON)
    workers = {each["pid"] for each in running.workers()}
    for times in range(1, 6):
        running.send_signal(signal.SIGUSR2)
        wait_for(running, "re-executing", times)
        lose_directory(running)
        wait_for(running, "adopted 2 workers", times)
        running.wait_ready()
        assert {each["pid"] for each in running.workers()} == workers


def test_one_that_was_adopted_from_a_lost_directory_can_be_found(tmp_path: Path) -> None:
    """It went between the adopter's question and its answer."""
    environment = {"STEER_RUNTIME_DIR": str(tmp_path / "steer")}
    first = Claim("web", None, environment)
    first.others_may_start()
    shutil.rmtree(first.path.parent)
    adopted = Claim.inherited(first.path, first.socket, remove_directory=True)
    assert not adopted.is_there
    adopted.renew("web", None, environment)
    assert adopted.is_there
    peer.connect(adopted.path).close()
    adopted.release()


def test_making_it_again_waits_for_nobody_who_is_starting(tmp_path: Path) -> None:
    """The loop would stand still for as long."""
    environment = {"STEER_RUNTIME_DIR": str(tmp_path / "steer")}
    claim = Claim("web", None, environment)
    claim.others_may_start()
    claim.path.unlink()
    turn = os.open(claim.path.parent, os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    began_s = time.monotonic()
    with pytest.raises(ControlError, match="another is starting; see who has"):
        claim.renew("web", None, environment)
    assert time.monotonic() - began_s < _TURN_S / 2
    os.close(turn)
    claim.renew("web", None, environment)
    claim.release()


# With one


def test_reload_that_is_under_way_goes_on(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(
        "import os, pathlib, time\n"
        "def serve(worker):\n"
        "    if worker.generation > 1:\n"
        "        pathlib.Path('begun').touch()\n"
        "        while not os.path.exists('go'): time.sleep(0.01)\n"
        "    worker.ready()\n"
        "    while not worker.stopping: worker.sockets[0].accept()[0].close()\n"
    )
    running = service("-w", "1", "app:serve", under=SOON)
    asking = subprocess.Popen(
        [STEER, "reload", "test"], env=running.environment, stdout=subprocess.PIPE, text=True
    )
    eventually((home / "begun").exists)
    lose_directory(running)
    eventually(lambda: "was removed; now it is" in running.log)
    (home / "go").touch()
    told, _ = asking.communicate(timeout=DEADLINE_S)
    assert told.startswith("reloaded test: generation 2"), running.log
    assert running.steer("status", "test").returncode == 0


def test_record_that_was_removed_is_made_again(service: StartService) -> None:
    """As who cleans directories removes old files and leaves sockets in use (tmpfiles.d(5))."""
    running = service("-w", "3", under=SOON)
    before = sorted(record.living(running.control_socket))
    assert len(before) == 3
    record_of(running.control_socket).unlink()
    eventually(lambda: sorted(record.living(running.control_socket)), before)
    record_of(running.control_socket).unlink()
    assert running.steer("scale", "test", "4").returncode == 0
    assert len(record.living(running.control_socket)) == 4
