"""What ends when the controller does, and what may keep it from listening."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steer.linux import processes
from testkit.fixtures import StartService
from testkit.processes import eventually, is_running

pytestmark = pytest.mark.needs("root", "netns")

STUBBORN = """
import signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
listener = socket.socket(fileno=3)
while True:
    listener.accept()[0].close()
"""
CAREFUL = """
import pathlib, signal, socket, sys
def finish(*_):
    pathlib.Path("finishing").touch()
    while not pathlib.Path("go").exists():
        pass
    pathlib.Path("finished").touch()
    sys.exit()
signal.signal(signal.SIGTERM, finish)
listener = socket.socket(fileno=3)
while True:
    listener.accept()[0].close()
"""
CHATTY = """
import socket, sys
listener = socket.socket(fileno=3)
for _ in range(4000):
    print("x" * 100, file=sys.stderr)
while True:
    listener.accept()[0].close()
"""


def in_shell(home: Path, script: str) -> tuple[str, ...]:
    """A command whose first process is a shell that passes no signal on."""
    (home / "server.py").write_text(script)
    return ("-w", "2", "--", "sh", "-c", f"{sys.executable} server.py; true")


def gone(pids: list[int]) -> bool:
    return not any(map(is_running, pids))


def test_workers_end_whatever_they_do_with_signals(service: StartService, home: Path) -> None:
    running = service("--adopt-timeout=0", "--graceful-timeout=0.5", *in_shell(home, STUBBORN))
    pids = [pid for worker in running.workers() for pid in processes.descendants(worker["pid"])]
    assert len(pids) == 4
    running.send_signal(signal.SIGKILL)
    running.wait()
    eventually(lambda: gone(pids))


def test_workers_are_told_and_given_time(service: StartService, home: Path) -> None:
    running = service("--adopt-timeout=0", *in_shell(home, CAREFUL))
    pids = [pid for worker in running.workers() for pid in processes.descendants(worker["pid"])]
    running.send_signal(signal.SIGKILL)
    running.wait()
    eventually((home / "finishing").exists)
    (home / "go").touch()
    eventually(lambda: gone(pids))
    assert (home / "finished").exists()


def test_what_a_shell_started_may_finish_too(service: StartService, home: Path) -> None:
    running = service(*in_shell(home, CAREFUL))
    running.send_signal(signal.SIGTERM)
    eventually((home / "finishing").exists)
    assert running.process.poll() is None
    (home / "go").touch()
    assert running.wait() == 0
    assert (home / "finished").exists()


def test_guard_ends_with_the_service(service: StartService) -> None:
    running = service("-w", "1")
    family = processes.descendants(running.pid)
    assert len(family) == 3  # the controller, its guard, a worker
    running.stop()
    assert gone(family)


def test_nobody_reads_what_workers_say(home: Path, netns: object) -> None:
    """The loop goes on: it answers, and ends when it is told to."""
    (home / "server.py").write_text(CHATTY)
    ours, theirs = os.pipe()
    environment = {**os.environ, "STEER_RUNTIME_DIR": str(home / "steer")}
    program = [sys.executable, "-m", "steer"]
    arguments = ["run", "--name", "mute", "-w", "2", "--", sys.executable, "server.py"]
    with subprocess.Popen(
        program + arguments, cwd=home, env=environment, stderr=theirs, stdout=subprocess.DEVNULL
    ) as process:
        os.close(theirs)

        def answers() -> bool:
            asked = subprocess.run(
                [*program, "status", "mute", "--json"], env=environment, capture_output=True
            )
            return asked.returncode == 0

        eventually(answers)
        process.terminate()
        assert process.wait(10) == 0
    os.close(ours)
