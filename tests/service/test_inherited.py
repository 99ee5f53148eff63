"""What steer inherits from who starts it: ignored signals, and a mask."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from steer.linux import processes
from testkit.fixtures import StartService
from testkit.processes import eventually

pytestmark = pytest.mark.needs("netns")
IGNORES_AND_BLOCKS = """
import os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""
UNDER = (sys.executable, "-c", IGNORES_AND_BLOCKS)
BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}


def signals(pid: int, what: str) -> set[int]:
    """Those ignored (SigIgn) or blocked (SigBlk) by a process, see proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith(f"{what}:"))
    return {number for number in range(1, 65) if mask >> number - 1 & 1}


def test_a_killed_worker_is_replaced_and_stop_returns(service: StartService) -> None:
    running = service("-w", "2", under=UNDER)
    pids = {each["pid"] for each in running.workers()}
    os.kill(min(pids), signal.SIGKILL)

    def replaced() -> bool:
        workers = running.workers()
        now = {each["pid"] for each in workers if each["state"] == "ready"}
        return len(now) == 2 and min(pids) not in now

    eventually(replaced)
    assert running.steer("stop").returncode == 0
    assert running.wait() == 0
    assert "bug" not in running.log


def test_neither_workers_nor_the_service_ignore_or_block_anything(service: StartService) -> None:
    """But SIGHUP, which nohup(1) has the service ignore; what Python ignores; and SIGCHLD, of
    which the controller, and nobody else, is told by a descriptor (signalfd(2))."""
    serve = "import socket; sock = socket.socket(fileno=3)\nwhile True: sock.accept()"
    running = service("-w", "1", "--", sys.executable, "-c", serve, under=UNDER)
    worker = running.workers()[0]["pid"]
    assert signals(running.pid, "SigIgn") <= {signal.SIGHUP, *BY_PYTHON}
    assert signals(running.pid, "SigBlk") == {signal.SIGCHLD}
    assert signals(worker, "SigIgn") <= BY_PYTHON
    eventually(lambda: len(processes.children(running.pid)), 2)  # the guard is the other
    blocked = [signals(pid, "SigBlk") for pid in processes.children(running.pid)]
    assert blocked == [set(), set()]
