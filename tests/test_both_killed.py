"""Controller and guard both killed with -9: nobody is left to adopt the workers."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from clients import answer, request
from conftest import StartService
from crew import PORT
from support import Service, eventually, is_running

from steer.kernel import proc, record

pytestmark = pytest.mark.needs("netns")
BIND = ("-b", f"127.0.0.1:{PORT}")


def kill_both(running: Service) -> list[int]:
    """The workers that are left."""
    workers = [each["pid"] for each in running.workers()]
    (guard,) = set(proc.children(running.pid)) - set(workers)
    for pid in (running.pid, guard):  # not to be noticed by the other
        os.kill(pid, signal.SIGSTOP)
    for pid in (guard, running.pid):
        os.kill(pid, signal.SIGKILL)
    running.wait()
    return workers


def test_stop_finds_and_ends_the_workers_and_status_tells_of_them(
    service: StartService,
) -> None:
    running = service(*BIND, "-w", "2")
    workers = kill_both(running)
    assert answer(request())["pid"] in workers

    told = json.loads(running.steer("status", "--json").stdout)
    assert [each["name"] for each in told["orphaned"]] == ["test"]
    assert "2 workers go on" in told["orphaned"][0]["state"]
    named = running.steer("status", "test")
    assert (named.returncode, "controller and guard were killed" in named.stderr) == (1, True)

    stopped = running.steer("stop", "test")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped test\n"), stopped.stderr
    assert not any(map(is_running, workers))
    assert not record.left(running.control_socket)
    assert not running.control_socket.parent.exists()


def test_a_new_start_ends_them_and_has_the_port(service: StartService) -> None:
    workers = kill_both(service(*BIND, "-w", "2"))
    again = service(*BIND, "-w", "2")
    assert "ending 2 workers whose controller and guard were killed" in again.log
    assert not any(map(is_running, workers))
    now = {each["pid"] for each in again.workers()}
    assert {answer(request())["pid"] for _ in range(8)} <= now


def test_one_that_does_not_end_when_told_to_is_killed(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(
        "import signal\n"
        "def stubborn(worker):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    while True: worker.sockets[0].accept()[0].close()\n"
    )
    running = service(*BIND, "-w", "1", "app:stubborn")
    (worker,) = kill_both(running)
    assert running.steer("stop", "--quick").returncode == 0
    assert not is_running(worker)


def test_nothing_is_left_of_the_record(service: StartService) -> None:
    running = service(*BIND, "-w", "1")
    beside = {each.name for each in running.control_socket.parent.iterdir()}
    assert "test.sock.workers" in beside
    running.stop()
    eventually(lambda: not running.control_socket.parent.exists())


@pytest.mark.parametrize("line", ["x", "1 1 15", "-1 5 15", f"{10**30} 1 1", "", "7 7 700"])
def test_lines_that_name_no_worker(tmp_path: Path, line: str) -> None:
    control = tmp_path / "web.sock"
    (tmp_path / "web.sock.workers").write_text(f"{line}\n")
    assert record.left(control) == []


def test_a_number_that_is_another_process_by_now_is_no_worker(tmp_path: Path) -> None:
    ticks = proc.start_time_ticks(os.getpid())
    assert ticks is not None
    path = tmp_path / "web.sock.workers"
    path.write_text(f"{os.getpid()} {ticks - 1} 15\n")
    assert record.left(tmp_path / "web.sock") == []
    path.write_text(f"{os.getpid()} {ticks} 15\n")
    assert record.left(tmp_path / "web.sock") == [(os.getpid(), 15)]
