"""Spares: they are ready, get nothing, and take the place of a worker that fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from testkit.clients import answer, freeze, is_answered, queue, request, send, udp_ask
from testkit.fixtures import StartService
from testkit.harness import CPUS, PORT, pinned
from testkit.processes import DEADLINE_S, eventually, is_running
from testkit.programs import source
from testkit.service import Service

pytestmark = pytest.mark.needs("netns")
ebpf = pytest.mark.needs("bpf", "migrate")
OPTIONS = ("--policy=round-robin", "--hang-timeout=0")


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(source("crashes"))


def break_it(home: Path) -> None:
    """No worker that starts from now on becomes ready."""
    (home / "broken").touch()


def states(running: Service) -> dict[int, str]:
    """By process id; that of the guard's workers without a process is missing."""
    return {each["pid"]: each["state"] for each in running.workers() if each["pid"]}


def pids(running: Service, state: str) -> list[int]:
    return [pid for pid, each in states(running).items() if each == state]


def answered(number: int) -> Counter[int]:
    """How many of so many requests, one after the other, each process answers."""
    found = Counter[int]()
    with pinned(CPUS[0]):
        for _ in range(number):
            found[answer(request())["pid"]] += 1
    return found


def kill(running: Service, pid: int) -> None:
    """And wait until the controller has seen it."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in states(running))


# It dies


@ebpf
def test_a_spare_gets_nothing_until_a_worker_dies(service: StartService, home: Path) -> None:
    running = service(*OPTIONS, "-w", "2", "--spares=1", "app:breaks")
    (first, second), (spare,) = pids(running, "ready"), pids(running, "spare")
    assert answered(10) == {first: 5, second: 5}

    break_it(home)
    kill(running, first)

    assert answered(10) == {second: 5, spare: 5}
    assert [each["cpus"] for each in running.workers() if each["pid"] == spare] == [list(CPUS)]
    assert "took the place of worker 0" in running.log
    assert "1 spare of 1 not ready to take a worker's place" in running.status()["notes"]
    assert "not ready to take" in running.steer("status").stdout

    (home / "broken").unlink()
    (fresh,) = eventually(lambda: pids(running, "spare"))
    assert answered(10) == {second: 5, spare: 5}
    assert fresh not in (first, second, spare)
    assert running.status()["notes"] == []


@ebpf
def test_the_only_worker_dies(service: StartService, home: Path, clients: ExitStack) -> None:
    """What waits for it is answered by the spare, and nothing is refused."""
    running = service("-w", "1", "--spares=1", "--hang-timeout=0", "app:breaks")
    (worker,), (spare,) = running.workers()[:1], pids(running, "spare")
    freeze(worker)
    waiting = queue(running, clients, 5, worker)
    break_it(home)
    send(worker, signal.SIGKILL)
    assert {answer(each)["pid"] for each in waiting} == {spare}
    assert answered(5) == {spare: 5}


@ebpf
def test_more_die_than_there_are_spares(service: StartService, home: Path) -> None:
    """The first that is ready again takes a place that is still empty."""
    running = service(*OPTIONS, "-w", "3", "--spares=1", "app:breaks")
    first, second, third = pids(running, "ready")
    (spare,) = pids(running, "spare")
    break_it(home)
    for pid in (first, second):
        kill(running, pid)
    assert answered(10) == {third: 5, spare: 5}
    (home / "broken").unlink()
    eventually(lambda: len(pids(running, "ready")) == 3 and len(pids(running, "spare")) == 1)
    assert sorted(answered(12).values()) == [4, 4, 4]


@ebpf
def test_workers_are_killed_under_load(service: StartService) -> None:
    """Each accepts one connection at a time: so no more fail than workers are killed."""
    running = service(*OPTIONS, "-w", "2", "--spares=1", "app:accepts")
    over, failures, done = threading.Event(), Counter[str](), Counter[int]()

    def ask() -> None:
        while not over.is_set():
            try:
                done[answer(request())["pid"]] += 1
            except (OSError, AssertionError) as error:
                failures[repr(error)] += 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for each in threads:
        each.start()
    kills = 10
    for _ in range(kills):
        eventually(lambda: pids(running, "spare"))
        os.kill(victim := pids(running, "ready")[0], signal.SIGKILL)
        eventually(lambda victim=victim: victim not in states(running))
    over.set()
    for each in threads:
        each.join()
    assert failures.total() <= kills, failures
    assert running.log.count("took the place of worker") == kills
    assert running.status()["totals"]["unsteered"] == 0


@pytest.mark.parametrize("policy", ["hash", "random"])
def test_classic_bpf_selects_no_spare_either(
    service: StartService, home: Path, policy: str
) -> None:
    options = ("--backend=cbpf", f"--policy={policy}", "--hang-timeout=0")
    running = service(*options, "-w", "2", "--spares=1", "app:breaks")
    (first, second), (spare,) = pids(running, "ready"), pids(running, "spare")
    assert answered(60).keys() == {first, second}
    break_it(home)
    kill(running, first)
    assert answered(60).keys() == {second, spare}


@ebpf
def test_datagrams(service: StartService, home: Path) -> None:
    bind = f"udp://127.0.0.1:{PORT}"
    running = service("-b", bind, *OPTIONS, "-w", "2", "--spares=1", "--demo")
    (first, second), (spare,) = pids(running, "ready"), pids(running, "spare")

    def asked(number: int) -> Counter[int]:
        with pinned(CPUS[0]):
            return Counter(udp_ask("127.0.0.1", PORT)["pid"] for _ in range(number))

    assert asked(10) == {first: 5, second: 5}
    kill(running, first)
    assert asked(10) == {second: 5, spare: 5}


@ebpf
def test_flows_of_the_only_worker_that_dies_go_to_the_spare(service: StartService) -> None:
    bind = f"udp://127.0.0.1:{PORT}"
    running = service("-b", bind, "--policy=flow", "-w", "1", "--spares=1", "--demo")
    (first,), (spare,) = pids(running, "ready"), pids(running, "spare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", PORT))

        def ask() -> int:
            client.send(b"x")
            pid: int = json.loads(client.recv(65536))["pid"]
            return pid

        assert {ask() for _ in range(5)} == {first}
        kill(running, first)
        assert {ask() for _ in range(5)} == {spare}


def test_the_hash_of_the_kernel_would_select_spares(service: StartService) -> None:
    running = service("--policy=kernel", "-w", "2", "--spares=1", "app:accepts")
    words = "no spares are started: the kernel's hash would select them as well"
    assert words in running.status()["notes"]
    assert words in running.log
    assert len(running.workers()) == 2


@ebpf
def test_spares_come_and_go_with_a_policy_that_can_leave_them_out(service: StartService) -> None:
    running = service("--policy=kernel", "-w", "2", "--spares=1", "app:accepts")
    running.steer("policy", "round-robin").check_returncode()
    eventually(lambda: len(pids(running, "spare")) == 1)
    running.steer("policy", "kernel").check_returncode()
    eventually(lambda: list(states(running).values()) == ["ready", "ready"])


# It hangs


@ebpf
@pytest.mark.needs("pidfd_getfd")
def test_what_waits_for_one_that_hangs_goes_to_the_spare(
    service: StartService, clients: ExitStack
) -> None:
    """Under least-conn all of it, as the spare has no connection yet; and the one that was hung is
    the spare when it goes on."""
    options = ("--policy=least-conn", "--hang-timeout=0.5", "--hang=skip")
    running = service(*options, "-w", "2", "--spares=1", "--demo")

    def connect(number: int) -> None:
        for _ in range(number):
            clients.enter_context(socket.create_connection(("127.0.0.1", PORT), DEADLINE_S))

    def counted(key: str) -> list[int]:
        return [each["connections"][key] for each in running.workers()]

    connect(8)
    assert counted("open") == [4, 4, 0]
    eventually(lambda: counted("queued"), [0, 0, 0])
    hung, _, spare = running.workers()
    freeze(hung)
    connect(6)
    eventually(lambda: pids(running, "hung"), [hung["pid"]])
    eventually(lambda: counted("migrated"), [0, 0, 3])
    assert counted("open") == [4, 7, 3]
    assert spare["pid"] in pids(running, "ready")
    send(hung, signal.SIGCONT)
    eventually(lambda: pids(running, "spare"), [hung["pid"]])


@ebpf
@pytest.mark.needs("pidfd_getfd")
def test_one_that_hangs_is_replaced_as_a_spare(service: StartService, clients: ExitStack) -> None:
    options = (*OPTIONS[:1], "--hang-timeout=0.3", "--graceful-timeout=0.3")
    running = service(*options, "-w", "2", "--spares=1", "app:accepts")
    hung, (spare,) = running.workers()[0], pids(running, "spare")
    freeze(hung)
    (waiting,) = queue(running, clients, 1, hung)
    eventually(lambda: is_answered(waiting))
    eventually(lambda: not is_running(hung["pid"]))
    running.wait_ready()
    assert spare in pids(running, "ready")
    (fresh,) = pids(running, "spare")
    assert fresh not in (hung["pid"], spare)


# What users do


@ebpf
def test_a_reload_starts_new_spares_and_scaling_keeps_them(service: StartService) -> None:
    running = service(*OPTIONS, "-w", "2", "--spares=2", "app:accepts")
    before = states(running)
    reload = running.steer("reload")
    assert "generation 2, 2 workers" in reload.stdout
    eventually(lambda: len(states(running)) == 4)
    after = states(running)
    assert not before.keys() & after.keys()
    assert sorted(after.values()) == ["ready", "ready", "spare", "spare"]

    spares = pids(running, "spare")
    for number in (4, 1):
        running.steer("scale", str(number)).check_returncode()
        eventually(lambda number=number: len(states(running)) == number + 2)
        assert pids(running, "spare") == spares
    assert len(answered(4)) == 1


@ebpf
def test_a_spare_is_restarted_and_not_drained(service: StartService) -> None:
    running = service(*OPTIONS, "-w", "2", "--spares=1", "app:accepts")
    (spare,) = pids(running, "spare")
    refused = running.steer("drain", "2")
    assert refused.returncode != 0
    assert "it is spare; has to be ready" in refused.stderr.replace("\n", " ")
    running.steer("restart", "2").check_returncode()
    eventually(lambda: pids(running, "spare") and pids(running, "spare") != [spare])
    assert len(pids(running, "ready")) == 2


@ebpf
def test_a_worker_that_is_drained_keeps_its_place(service: StartService) -> None:
    running = service(*OPTIONS, "-w", "2", "--spares=1", "app:accepts")
    (first, second), (spare,) = pids(running, "ready"), pids(running, "spare")
    running.steer("drain", "0").check_returncode()
    assert answered(4) == {second: 4}
    running.steer("undrain", "0").check_returncode()
    assert answered(4) == {first: 2, second: 2}
    assert pids(running, "spare") == [spare]


@ebpf
def test_one_that_says_it_stops_is_replaced_before_it_has_ended(service: StartService) -> None:
    running = service(*OPTIONS, "-w", "1", "--spares=1", "app:accepts")
    (leaving,), (spare,) = pids(running, "ready"), pids(running, "spare")
    assert answer(request("/stopping"))["pid"] == leaving
    eventually(lambda: pids(running, "draining"), [leaving])
    assert answered(4) == {spare: 4}
    running.steer("undrain", "0").check_returncode()
    assert pids(running, "spare") == [leaving]


@ebpf
@pytest.mark.needs("root")
def test_who_is_a_spare_is_known_to_the_controller_that_adopts(
    service: StartService, home: Path
) -> None:
    first = service(*OPTIONS, "-w", "2", "--spares=1", "app:breaks")
    (dead, _), (promoted,) = pids(first, "ready"), pids(first, "spare")
    kill(first, dead)
    eventually(lambda: pids(first, "spare"))
    before = states(first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(answered(10)) == 2

    second = service(*OPTIONS, "-w", "2", "--spares=1", "app:breaks")
    assert states(second) == before
    assert before[promoted] == "ready"
    break_it(home)
    (spare,) = pids(second, "spare")
    kill(second, promoted)
    assert answered(10)[spare] == 5


@ebpf
@pytest.mark.needs("root")
def test_a_worker_that_died_without_a_controller_is_replaced_by_the_spare(
    service: StartService, home: Path
) -> None:
    first = service(*OPTIONS, "-w", "2", "--spares=1", "app:breaks")
    (dead, other), (spare,) = pids(first, "ready"), pids(first, "spare")
    first.send_signal(signal.SIGKILL)
    first.wait()
    os.kill(dead, signal.SIGKILL)
    eventually(lambda: not is_running(dead))
    break_it(home)
    second = service(*OPTIONS, "-w", "2", "--spares=1", "app:breaks", ready=False)
    second.wait_asked()
    eventually(lambda: sorted(pids(second, "ready")) == sorted([other, spare]))
    assert answered(10) == {other: 5, spare: 5}
