"""Workers that take nothing: others get what waits for them, and nobody dies of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from steer.linux import activity, processes
from steer.sockets.listeners import Borrower, waiting
from testkit.clients import answer, freeze, is_answered, queue, request, send, udp_ask
from testkit.fixtures import StartService
from testkit.harness import CPUS, PORT, pinned
from testkit.processes import DEADLINE_S, eventually, is_ready, is_running
from testkit.programs import source
from testkit.service import Service

# Workers

APP = source("takes_nothing_for_a_while")
GUNICORN = ("--", sys.executable, "-m", "gunicorn", "-w", "1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "demo": (),
    "loop": ("app:accepts",),
    "uvicorn": ("--", sys.executable, "-m", "uvicorn", "app:asgi", "--fd", "{fd}",
                "--lifespan", "off"),
    "gunicorn": (*GUNICORN, "app:wsgi"),
    "gthread": (*GUNICORN, "-k", "gthread", "--threads", "2", "app:wsgi"),
}  # fmt: skip
NEEDS = {"uvicorn": ("uvicorn",), "gunicorn": ("gunicorn",), "gthread": ("gunicorn",)}


def servers(*names: str) -> pytest.MarkDecorator:
    marked = [pytest.param(n, marks=pytest.mark.needs(*NEEDS.get(n, ()))) for n in names]
    return pytest.mark.parametrize("server", marked)


needs = pytest.mark.needs("netns", "bpf", "migrate", "pidfd_getfd")
OPTIONS = ("--policy=round-robin", "--hang-timeout=0.3", "--graceful-timeout=0.3")


@pytest.fixture
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)
    os.mkfifo(home / "gate")


pytestmark = pytest.mark.usefixtures("application")


def answers(number: int) -> set[int]:
    """The slots that answer so many, one after the other, from every CPU."""
    slots = set()
    for turn in range(number):
        with pinned(CPUS[turn % len(CPUS)]):
            slots.add(answer(request())["slot"])
    return slots


def slots_of(waiting: list[socket.socket]) -> set[int]:
    """Who answers these."""
    return {answer(sock)["slot"] for sock in waiting}


def state(running: Service, worker: dict[str, Any]) -> str | None:
    """None once it is gone."""
    return next((e["state"] for e in running.workers() if e["pid"] == worker["pid"]), None)


def wait_for(running: Service, worker: dict[str, Any], wanted: str | None) -> None:
    eventually(lambda: state(running, worker) == wanted)


def queued(worker: dict[str, Any]) -> int:
    """Connections, or bytes of datagrams."""
    with Borrower(worker["pid"], frozenset(worker["sockets"])).borrow() as lent:
        return sum(waiting(sock).queued for sock in lent.values())


def begin(running: Service, target: str) -> tuple[dict[str, Any], socket.socket]:
    """A request that takes long, and the worker that is at it."""
    before = running.selected()
    sock = request(target)
    (slot,) = (slot for slot, times in running.selected().items() if times > before[slot])
    (worker,) = (each for each in running.workers() if each["slot"] == slot)
    eventually(lambda: queued(worker), 0)
    return worker, sock


def restarts(running: Service) -> int:
    return sum(each["restarts"] for each in running.workers())


def faults(running: Service) -> list[str]:
    """What was logged as something that should not be."""
    words = ("Traceback", "ERROR", "Exception", "Errno", "CRITICAL", "bug in steer")
    lines = [line for line in running.log.splitlines() if any(word in line for word in words)]
    # Several on one machine race for that file.
    return [line for line in lines if "gunicorn.ctl" not in line]


# Stopped


@needs
@servers("demo", "loop", "uvicorn", "gunicorn", "gthread")
def test_stopped_and_back(service: StartService, clients: ExitStack, server: str) -> None:
    """Others answer meanwhile; it serves on as if nothing had been."""
    running = service(*OPTIONS, "--hang=skip", "-w", "4", *COMMANDS[server])
    before = {each["pid"] for each in running.workers()}
    stopped = running.workers()[1]
    freeze(stopped)
    chosen = queue(running, clients, 3, stopped)
    wait_for(running, stopped, "hung")

    assert stopped["slot"] not in slots_of(chosen)
    assert stopped["slot"] not in answers(16)
    assert state(running, stopped) == "hung"
    assert running.status()["totals"]["migrated"] == 3

    send(stopped, signal.SIGCONT)
    wait_for(running, stopped, "ready")
    eventually(lambda: stopped["slot"] in answers(4))
    assert {each["pid"] for each in running.workers()} == before
    assert restarts(running) == 0
    assert faults(running) == []


@needs
@servers("demo", "gunicorn")
def test_stopped_for_good(service: StartService, clients: ExitStack, server: str) -> None:
    """Another takes its place, and it is killed when its time to finish is over."""
    running = service(*OPTIONS, "-w", "3", *COMMANDS[server])
    stopped = running.workers()[1]
    family = processes.descendants(stopped["pid"])
    freeze(stopped)
    chosen = queue(running, clients, 3, stopped)

    assert stopped["slot"] not in slots_of(chosen)
    wait_for(running, stopped, None)
    assert not any(map(is_running, family))
    running.wait_ready(3)
    assert len(running.workers()) == 3
    assert len(answers(9)) == 3
    assert "not finished in time: killed" in running.log
    assert faults(running) == []


@needs
def test_only_the_process_that_accepts_is_stopped(
    service: StartService, clients: ExitStack
) -> None:
    """The one above it goes on waking up, and says nothing by it."""
    running = service(*OPTIONS, "--hang=skip", "--backlog=2", "-w", "2", "app:arbiter")
    stopped = running.workers()[1]
    _, child = processes.descendants(stopped["pid"])
    os.kill(child, signal.SIGSTOP)
    eventually(lambda: activity.is_stopped(child))
    chosen = queue(running, clients, 3, stopped)  # and there is room for no more
    wait_for(running, stopped, "hung")
    assert stopped["slot"] not in slots_of(chosen)
    os.kill(child, signal.SIGCONT)
    wait_for(running, stopped, "ready")


@needs
def test_back_after_it_was_replaced(service: StartService, clients: ExitStack) -> None:
    """It finishes what it had, and ends by itself."""
    running = service("--policy=round-robin", "--hang-timeout=0.3", "-w", "2")
    stopped, begun = begin(running, "/?sleep_ms=500")
    freeze(stopped)
    (chosen,) = queue(running, clients, 1, stopped)
    wait_for(running, stopped, "stopping")
    assert answer(chosen)["pid"] != stopped["pid"]

    send(stopped, signal.SIGCONT)
    assert answer(begun)["pid"] == stopped["pid"]
    wait_for(running, stopped, None)
    assert "killed" not in running.log


@needs
def test_the_last_that_serves_is_not_given_up(service: StartService, clients: ExitStack) -> None:
    running = service(*OPTIONS, "--hang=skip", "-w", "3")
    workers = running.workers()
    for each in workers:
        freeze(each)
    chosen = [clients.enter_context(request()) for _ in range(9)]
    eventually(lambda: sorted(each["state"] for each in running.workers()),
               ["hung", "hung", "ready"])  # fmt: skip
    (last,) = (each for each in running.workers() if each["state"] == "ready")
    chosen += [clients.enter_context(request()) for _ in range(3)]
    eventually(lambda: queued(last), 12)

    for each in workers:
        send(each, signal.SIGCONT)
    slots_of(chosen)
    running.wait_ready(3)
    assert running.log.count("is hung") == 2
    assert restarts(running) == 0


@needs
def test_all_that_are_stopped_are_replaced(service: StartService, clients: ExitStack) -> None:
    running = service(*OPTIONS, "-w", "3")
    before = running.workers()
    for each in before:
        freeze(each)
    chosen = [clients.enter_context(request()) for _ in range(9)]
    assert slots_of(chosen).isdisjoint(each["slot"] for each in before)
    for each in before:
        wait_for(running, each, None)
    running.wait_ready(3)


@needs
def test_over_udp(service: StartService) -> None:
    """What waits stays; what comes later goes elsewhere."""
    running = service(*OPTIONS, "--hang=skip", "-w", "2", "-b", f"udp://127.0.0.1:{PORT}")
    stopped = running.workers()[1]
    freeze(stopped)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(("127.0.0.1", PORT))
        while not queued(stopped):
            sock.send(b"")
        wait_for(running, stopped, "hung")
        assert {udp_ask("127.0.0.1", PORT)["slot"] for _ in range(8)} == {1 - stopped["slot"]}
        send(stopped, signal.SIGCONT)
        while json.loads(sock.recv(1000))["slot"] != stopped["slot"]:
            pass
    wait_for(running, stopped, "ready")
    assert {udp_ask("127.0.0.1", PORT)["slot"] for _ in range(8)} == {0, 1}


# Busy

ASLEEP, AWAKE = "/?block=gate", "/?compute=go"
"""Requests that take until `release`."""


def release(home: Path, target: str) -> None:
    name = target.partition("=")[2]
    (home / name).write_bytes(b"")


@needs
@servers("uvicorn", "gunicorn")
@pytest.mark.parametrize("target", [ASLEEP, AWAKE], ids=["asleep", "awake"])
def test_busy_with_one_request(
    service: StartService, home: Path, clients: ExitStack, server: str, target: str
) -> None:
    """Others answer what waits for it; it answers the one, and serves on."""
    running = service(*OPTIONS, "--hang=skip", "-w", "2", *COMMANDS[server])
    pids = {each["pid"] for each in running.workers()}
    busy, begun = begin(running, target)
    chosen = queue(running, clients, 3, busy)
    assert busy["slot"] not in slots_of(chosen)
    assert not is_answered(begun)

    release(home, target)
    assert answer(begun)["slot"] == busy["slot"]
    wait_for(running, busy, "ready")
    eventually(lambda: busy["slot"] in answers(4))
    assert {each["pid"] for each in running.workers()} == pids
    assert faults(running) == []


@needs
@servers("loop", "gunicorn")
def test_replaced_it_is_not_killed_while_it_does_something(
    service: StartService, home: Path, clients: ExitStack, server: str
) -> None:
    """Though its time to finish is over several times."""
    options = ("--policy=round-robin", "--hang-timeout=0.3", "--graceful-timeout=0.5", "-w", "2")
    running = service(*options, *COMMANDS[server])
    busy, begun = begin(running, f"{ASLEEP}&{AWAKE[2:]}")
    chosen = queue(running, clients, 2, busy)
    assert busy["slot"] not in slots_of(chosen)
    wait_for(running, busy, "stopping")
    release(home, ASLEEP)
    assert not is_ready(begun, 2.0)
    assert state(running, busy) == "stopping"

    release(home, AWAKE)
    assert answer(begun)["slot"] == busy["slot"]
    wait_for(running, busy, None)
    assert "killed" not in running.log
    assert faults(running) == []


@needs
def test_replaced_it_does_not_keep_the_service_from_ending(
    service: StartService, clients: ExitStack
) -> None:
    options = ("--policy=round-robin", "--hang-timeout=0.3", "--graceful-timeout=0.1", "-w", "2")
    running = service(*options, "app:accepts")
    busy, begun = begin(running, ASLEEP)
    clients.enter_context(begun)
    queue(running, clients, 2, busy)
    wait_for(running, busy, "stopping")
    assert running.stop() == 0


@needs
def test_asleep_it_has_its_time_to_finish(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    running = service("--policy=round-robin", "--hang-timeout=0.3", "-w", "2", "app:accepts")
    busy, begun = begin(running, ASLEEP)
    queue(running, clients, 2, busy)
    wait_for(running, busy, "stopping")
    release(home, ASLEEP)
    assert answer(begun)["slot"] == busy["slot"]
    wait_for(running, busy, None)
    assert "killed" not in running.log


@needs
def test_hung_when_the_controller_is_replaced(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """The next one sees to it."""
    options = ("--policy=round-robin", "--hang-timeout=0.3", "-w", "2", "app:breaks")
    first = service(*options)
    busy, begun = begin(first, ASLEEP)
    (home / "broken").touch()
    queue(first, clients, 1, busy)
    eventually(lambda: "replace worker" in first.log)
    assert state(first, busy) == "hung"
    first.send_signal(signal.SIGKILL)
    first.wait()
    (home / "broken").unlink()
    second = service(*options, ready=False).wait_ready(2)
    wait_for(second, busy, "stopping")
    release(home, ASLEEP)
    assert answer(begun)["slot"] == busy["slot"]
    wait_for(second, busy, None)


@needs
def test_two_binds(service: StartService, home: Path, clients: ExitStack) -> None:
    """What is taken is counted for each."""
    binds = ("-b", f"127.0.0.1:{PORT}", "-b", "[::1]:8081")
    running = service(*OPTIONS, "--hang=skip", "-w", "2", *binds, "app:accepts")
    busy, begun = begin(running, AWAKE)
    chosen = queue(running, clients, 3, busy)
    assert busy["slot"] not in slots_of(chosen)
    release(home, AWAKE)
    assert answer(begun)["slot"] == busy["slot"]
    wait_for(running, busy, "ready")


@needs
def test_all_is_slow(service: StartService, clients: ExitStack) -> None:
    """Others may take their places, but not others again before these have finished."""
    options = ("--policy=round-robin", "--hang-timeout=0.1", "-w", "2")
    running = service(*options, "app:accepts")
    chosen = [clients.enter_context(request("/?sleep=0.5")) for _ in range(10)]
    most = 0

    def all_answered() -> bool:
        nonlocal most
        most = max(most, len(running.workers()))
        return all(map(is_answered, chosen))

    eventually(all_answered)
    assert most <= 4
    slots_of(chosen)
    assert "killed" not in running.log


@needs
def test_datagrams_read_slowly(service: StartService) -> None:
    bind = ("-b", f"udp://127.0.0.1:{PORT}")
    running = service("--policy=hash", "--hang-timeout=0.3", "-w", "2", *bind, "app:reads")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(("127.0.0.1", PORT))
        for _ in range(12):
            sock.send(b"0.1")
        assert len({sock.recv(1000) for _ in range(12)}) == 1
    assert "is hung" not in running.log


@needs
def test_not_looked_for(service: StartService, clients: ExitStack) -> None:
    running = service("--policy=round-robin", "--hang-timeout=0", "-w", "2", "app:accepts")
    busy, begun = begin(running, "/?sleep=0.3")
    (chosen,) = queue(running, clients, 1, busy)
    assert answer(begun)["slot"] == answer(chosen)["slot"] == busy["slot"]
    assert "is hung" not in running.log


@needs
@pytest.mark.parametrize("backend", ["cbpf", "kernel"])
def test_without_ebpf_it_is_replaced(service: StartService, backend: str) -> None:
    """What waits for it is lost, as its notes say; what comes later is not."""
    options = ("--policy=hash", "--hang-timeout=0.3", "--graceful-timeout=0", "-w", "2")
    running = service(*options, "--backend", backend)
    stopped = running.workers()[1]
    freeze(stopped)
    with ExitStack() as clients:
        while not queued(stopped):
            clients.enter_context(request())
        wait_for(running, stopped, None)
    assert "worker 1 is hung" in running.log
    running.wait_ready(2)
    assert stopped["slot"] not in answers(16)
    assert any("lost" in note for note in running.status()["notes"])


@needs
def test_the_kernel_chooses_one_that_hangs_all_the_same(service: StartService) -> None:
    """Which is said, as nobody can do anything about it."""
    options = ("--backend=kernel", "--policy=kernel", "--hang-timeout=0.3", "--hang=skip")
    running = service(*options, "-w", "2")
    stopped = running.workers()[1]
    freeze(stopped)
    with ExitStack() as clients:
        while not queued(stopped):
            clients.enter_context(request())
        wait_for(running, stopped, "hung")
        before = queued(stopped)
        while queued(stopped) == before:
            clients.enter_context(request())
        note = "hung: worker 1; the kernel's hash still selects it"
        assert note in running.status()["notes"]
        (line,) = (line for line in running.log.splitlines() if "worker 1 is hung" in line)
        assert line.endswith("the kernel's hash still selects it")
        send(stopped, signal.SIGCONT)
        wait_for(running, stopped, "ready")
        assert note not in running.status()["notes"]


# Watchdog

WATCHED = ("--policy=round-robin", "--hang-timeout=0", "--watchdog=0.5", "--hang=skip", "-w", "2")


@needs
def test_watchdog_missed_and_heard_again(service: StartService, home: Path) -> None:
    running = service(*WATCHED, "app:beats")
    silent = running.workers()[1]
    (home / f"silent-{silent['slot']}").touch()
    wait_for(running, silent, "hung")
    assert f"worker {silent['slot']} is hung: it missed its watchdog" in running.log
    assert silent["slot"] not in answers(8)
    (home / f"silent-{silent['slot']}").unlink()
    wait_for(running, silent, "ready")
    assert answers(8) == {0, 1}
    assert running.log.count("is hung") == 1
    assert restarts(running) == 0


@needs
def test_watchdog_asked_for_by_the_worker(service: StartService) -> None:
    """Needs no --watchdog, as with systemd; and what it says later counts."""
    options = ("--policy=round-robin", "--hang-timeout=0.5", "--hang=skip", "-w", "2")
    running = service(*options, "app:accepts")
    slot = answer(request("/?tell=WATCHDOG%3Dtrigger"))["slot"]
    asked = next(each for each in running.workers() if each["slot"] == slot)
    wait_for(running, asked, "hung")
    assert slot not in answers(8)


@needs
def test_watchdog_of_the_demo(service: StartService) -> None:
    running = service(*WATCHED)
    stopped, other = running.workers()
    freeze(stopped)
    wait_for(running, stopped, "hung")
    send(stopped, signal.SIGCONT)
    wait_for(running, stopped, "ready")
    assert f"worker {other['slot']} is hung" not in running.log


@needs
def test_watchdog_is_told_to_commands(service: StartService) -> None:
    script = (
        "import os, socket; print(os.environ['WATCHDOG_USEC']); socket.socket(fileno=3).accept()"
    )
    running = service("-w", "1", "--watchdog=1.5", "--", sys.executable, "-uc", script)
    assert running.output.split() == ["1500000"]
