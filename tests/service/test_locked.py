"""Workers that set SO_LOCK_FILTER on their sockets: no program can be attached through those."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.policy.builtin import CBPF, EBPF
from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.processes import eventually

pytestmark = pytest.mark.usefixtures("netns")

APP = """
import os, socket, time
from pathlib import Path

def lock(worker):
    for sock in worker.sockets:
        sock.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER

def serve(worker):
    if worker.slot in LOCKED:
        lock(worker)
    worker.ready()
    while not worker.stopping:
        time.sleep(0.05)
        if os.path.exists("lock"):
            lock(worker)
            Path(f"locked-{worker.slot}").touch()
"""
BOTH = "EPERM, as workers 0, 1 set SO_LOCK_FILTER on their sockets; leave one socket of"
UDP, TCP = f"udp://127.0.0.1:{PORT}", f"127.0.0.1:{PORT}"


def write(home: Path, locked: tuple[int, ...]) -> None:
    (home / "locks.py").write_text(f"LOCKED = {locked}\n{APP}")


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("backend", [EBPF, CBPF])
def test_a_program_is_attached_through_another_member(
    service: StartService, home: Path, backend: str
) -> None:
    write(home, (0, 1))
    options = ("--policy=hash", f"--backend={backend}", "--hang-timeout=0", "-w3")
    running = service(*options, "-b", UDP, "-b", TCP, "locks:serve")
    for policy in ("source", "kernel", "hash") if backend == EBPF else ("source", "hash"):
        done = running.steer("policy", policy)
        assert done.returncode == 0, done.stderr
    # While it is out of the table, and when it leaves, it is done again.
    assert running.steer("drain", "2").returncode == 0
    assert running.steer("undrain", "2").returncode == 0
    assert running.steer("restart", "0").returncode == 0
    assert (running.status()["policy"], running.status()["backend"]) == ("hash", backend)
    assert "[ERROR]" not in running.log


@pytest.mark.needs("bpf")
def test_a_change_that_no_member_allows_names_them(service: StartService, home: Path) -> None:
    write(home, (0, 1))
    running = service("--policy=hash", "--hang-timeout=0", "-w2", "-b", UDP, "locks:serve")
    done = running.steer("policy", "source")
    assert done.returncode == 1
    assert BOTH in done.stderr
    assert "CAP_BPF" not in done.stderr
    # Detached it can be through any; back from there it is refused, and the hash goes on.
    assert running.steer("policy", "kernel").returncode == 0
    done = running.steer("policy", "hash")
    assert done.returncode == 1
    assert f"attach a program: {BOTH}" in done.stderr
    assert running.status()["backend"] == "kernel"


def test_on_cbpf_it_names_nobody_but_workers(service: StartService, home: Path) -> None:
    """The guard process has their sockets open, too."""
    write(home, ())
    options = ("--policy=hash", "--backend=cbpf", "--hang-timeout=0", "-w2")
    running = service(*options, "-b", TCP, "locks:serve")
    (home / "lock").touch()
    eventually(lambda: len(list(home.glob("locked-*"))), 2)
    done = running.steer("policy", "source")
    assert done.returncode == 1
    assert BOTH in done.stderr
    done = running.steer("drain", "1")
    eventually(lambda: BOTH in running.log + done.stderr)
    assert "(pid " not in done.stderr + running.log


def test_workers_that_lock_theirs_at_the_start_are_named(service: StartService, home: Path) -> None:
    write(home, (0, 1))
    options = ("--policy=hash", "--backend=cbpf", "--hang-timeout=0", "-w2")
    running = service(*options, "-b", TCP, "locks:serve", ready=False)
    eventually(lambda: BOTH in running.log)
