"""The controller goes: its workers serve on, and another takes them over."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from steer.errors import ControlError
from steer.linux import processes
from testkit.clients import http_get
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.harness import CPUS, pinned
from testkit.processes import DEADLINE_S, eventually, is_running, session
from testkit.programs import source
from testkit.service import Service, start_service

pytestmark = pytest.mark.needs("root", "netns")

HOST, PORT = "127.0.0.1", 8080
SCRIPT = source("http_server")
MARKER = """
import sys
if "run" in sys.orig_argv and "--check-config" not in sys.orig_argv:
    print("image {}", file=sys.stderr, flush=True)
"""


@pytest.fixture
def script(home: Path) -> tuple[str, ...]:
    """A command; files in `home` say to its slots what to do: "crash0", "hang1", "wait2"; or
    to all, "busy"."""
    (home / "server.py").write_text(SCRIPT)
    return ("--", "python3", "server.py", "{slot}")


def orphan(running: Service) -> Service:
    """End its controller, and nothing but that."""
    running.send_signal(signal.SIGKILL)
    running.wait()
    return running


def guard_of(running: Service) -> int:
    workers = {worker["pid"] for worker in running.workers()}
    (guard,) = eventually(lambda: set(processes.children(running.pid)) - workers)
    return guard


def by_slot(running: Service) -> dict[int, int]:
    """Process ids."""
    return {worker["slot"]: worker["pid"] for worker in running.workers()}


def ready(running: Service, workers: int = 2) -> bool:
    states = [worker["state"] for worker in running.workers()]
    return states == ["ready"] * workers


def ask(number: int) -> list[int]:
    """The slots that answer."""
    return [http_get(HOST, PORT)[1]["slot"] for _ in range(number)]


def orphaned_words(running: Service) -> str:
    with pytest.raises(ControlError) as caught:
        running.status()
    return str(caught.value)


def refused(*arguments: str, running: Service) -> str:
    """What `steer run` of this name says when it may not."""
    second = start_service(
        *arguments, name=running.name, environment=running.environment, home=running.home
    )
    assert second.wait() == 1, second.log
    return second.log


_PAUSE_S = 0.002
"""So that those who are asked have the CPUs too."""


class Load:
    """Clients that ask all the time.

    Attributes:
        answered: by the answering process.
        failures: what went wrong instead.
    """

    def __init__(self, clients: int = 4) -> None:
        self.answered: Counter[int] = Counter()
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._over.wait(_PAUSE_S):
            try:
                self.answered[http_get(HOST, PORT)[1]["pid"]] += 1
            except (OSError, ValueError) as error:
                self.failures.append(repr(error))

    def goes_on(self, requests: int = 100) -> None:
        """Until so many more were answered."""
        wanted = self.answered.total() + requests
        eventually(lambda: self.answered.total() >= wanted)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


# Workers serve on, and are adopted.


@pytest.mark.needs("bpf")
def test_nothing_is_lost(service: StartService) -> None:
    first = service("-w", "3", "--policy=round-robin")
    workers = by_slot(first)
    with Load() as load:
        orphan(first)
        load.goes_on()
        second = service("-w", "3", "--policy=round-robin")
        load.goes_on()
    assert load.failures == []
    assert by_slot(second) == workers
    assert set(load.answered) == set(workers.values())
    assert second.status()["totals"]["selected"] == load.answered.total()
    assert max(load.answered.values()) - min(load.answered.values()) <= 3 * len(CPUS)


@pytest.mark.needs("bpf")
def test_turns_go_on(service: StartService) -> None:
    arguments = ("-w", "3", "--policy=round-robin")
    first = service(*arguments)
    with pinned(CPUS[0]):
        order = ask(3)
        orphan(first)
        assert sorted(order) == [0, 1, 2]
        assert ask(6) == order * 2
        service(*arguments)
        assert ask(6) == order * 2


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_cpus_keep_their_workers(service: StartService, backend: str) -> None:
    arguments = ("-w", str(len(CPUS)), "--policy=cpu", f"--backend={backend}")
    first = service(*arguments)
    workers = {worker["cpus"][0]: worker["slot"] for worker in first.workers()}

    def each_cpu_has_its_own() -> None:
        for cpu in CPUS:
            with pinned(cpu):
                assert ask(5) == [workers[cpu]] * 5

    each_cpu_has_its_own()
    orphan(first)
    each_cpu_has_its_own()
    service(*arguments)
    each_cpu_has_its_own()


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_flows_keep_their_workers(service: StartService, backend: str) -> None:
    """Also those that moved when a worker was replaced."""
    arguments = ("-w", "3", "--policy=hash", f"--backend={backend}")
    first = service(*arguments)
    assert first.steer("restart", "1").returncode == 0
    assert first.steer("scale", "4").returncode == 0

    def slots() -> list[int]:
        return [slot_of(port) for port in range(20_000, 20_040)]

    before = slots()
    assert len(set(before)) == 4
    orphan(first)
    assert slots() == before
    service(*arguments)
    assert slots() == before


def slot_of(source_port: int) -> int:
    """Who answers a connection from this port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.settimeout(DEADLINE_S)
        sock.bind((HOST, source_port))
        sock.connect((HOST, PORT))
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with sock.makefile("rb") as answer:
            slot: int = json.loads(answer.read().partition(b"\r\n\r\n")[2])["slot"]
            return slot


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("backend", ["ebpf", "cbpf", "kernel"])
def test_all_is_as_it_was(service: StartService, backend: str) -> None:
    arguments = ("-w", "2", f"--policy={'kernel' if backend == 'kernel' else 'hash'}")
    if backend != "kernel":
        arguments = (*arguments, f"--backend={backend}")
    first = service(*arguments)
    first.ask("reload")
    eventually(lambda: ready(first))
    first.ask("restart", slot=min(by_slot(first)))
    eventually(lambda: ready(first))
    ask(20)
    before = first.status()
    orphan(first)
    after = service(*arguments).status()
    differs = {key for key in before if before[key] != after[key]}
    assert differs == {"pid", "uptime_s", "workers", "loop_delay_ms"}
    assert after["uptime_s"] > before["uptime_s"]
    workers = sorted(before["workers"], key=lambda worker: worker["slot"])
    adopted = sorted(after["workers"], key=lambda worker: worker["slot"])
    for one, other in zip(workers, adopted, strict=True):
        assert {key for key in one if one[key] != other[key]} == {"uptime_s"}
        assert other["uptime_s"] > one["uptime_s"]


def test_status_tells_that_the_controller_is_gone(service: StartService, steer: RunSteer) -> None:
    orphan(service("-w", "2", "--adopt-timeout=300"))
    told = steer("status", "test")
    assert told.returncode == 1
    assert "controller is gone; 2 workers still serving, for " in told.stderr
    assert "unless `steer run`" in told.stderr
    told = steer("reload", "test")
    assert told.returncode == 1
    assert "controller is gone" in told.stderr
    service("-w", "2")
    assert steer("status", "test").returncode == 0


def test_status_of_all_is_not_kept_from_telling(service: StartService, steer: RunSteer) -> None:
    orphan(service("-w", "2", "-b", f"{HOST}:{PORT}", name="lost"))
    service("-w", "1", "-b", f"{HOST}:{PORT + 1}", name="well")
    told = steer("status")
    assert told.returncode == 0
    assert "well  running" in told.stdout
    assert "lost" in told.stdout
    assert "controller is gone; 2 workers still serving" in told.stdout
    found = json.loads(steer("status", "--json").stdout)
    assert [one["name"] for one in found["services"]] == ["well"]
    assert [one["name"] for one in found["orphaned"]] == ["lost"]
    service("-w", "2", "-b", f"{HOST}:{PORT}", name="lost")


@pytest.mark.parametrize("backend", ["auto", "cbpf"])
def test_adopted_workers_obey(service: StartService, backend: str) -> None:
    arguments = ("-w", "2", "--policy=hash", f"--backend={backend}")
    orphan(service(*arguments))
    running = service(*arguments)
    old = by_slot(running)
    slots = sorted(old)
    with Load(clients=2) as load:
        assert running.steer("drain", str(slots[0])).returncode == 0
        assert running.steer("undrain", str(slots[0])).returncode == 0
        assert running.steer("restart", str(slots[0])).returncode == 0
        eventually(lambda: not is_running(old[slots[0]]))
        assert running.steer("scale", "3").returncode == 0
        eventually(lambda: ready(running, 3))
        assert running.steer("reload").returncode == 0
        eventually(lambda: ready(running))
        assert not set(old.values()) & set(by_slot(running).values())
        load.goes_on()
    assert load.failures == []
    assert running.steer("stop").returncode == 0
    assert running.wait() == 0


def test_slots_go_round(service: StartService) -> None:
    """A slot that was just given up is not somebody else's at once."""
    first = service("-w", "2")
    os.kill(by_slot(first)[0], signal.SIGKILL)
    eventually(lambda: sorted(by_slot(first)) == [1, 2] and ready(first))
    orphan(first)
    second = service("-w", "2")
    assert sorted(by_slot(second)) == [1, 2]
    os.kill(by_slot(second)[1], signal.SIGKILL)
    eventually(lambda: sorted(by_slot(second)) == [2, 3] and ready(second))


@pytest.mark.needs("bpf")
def test_what_was_counted_is_not_lost(service: StartService) -> None:
    """Nor for a worker that has ended, while its slot waits for another."""
    arguments = ("-w", "2", "--policy=round-robin")
    first = service(*arguments)
    for _ in range(4):
        first.wait_ready()
        ask(10)
        slot, pid = max(by_slot(first).items())
        os.kill(pid, signal.SIGKILL)
        eventually(lambda slot=slot: f"worker {slot} (pid" in first.log)
    eventually(lambda: "another in 1 s" in first.log)
    orphan(first)
    second = service(*arguments)
    assert second.status()["totals"]["selected"] == 40
    before = sum(second.selected().values())
    ask(10)
    assert second.status()["totals"]["selected"] == 50
    assert sum(second.selected().values()) == before + 10


# Not all was well when it went.


@pytest.mark.parametrize("backend", ["auto", "cbpf", "kernel"])
def test_workers_that_died_meanwhile_are_replaced(
    service: StartService, script: tuple[str, ...], home: Path, backend: str
) -> None:
    arguments = ("-w", "4", "--policy=kernel", *script)
    if backend != "kernel":
        arguments = ("-w", "4", "--policy=hash", f"--backend={backend}", *script)
    first = service(*arguments)
    workers, ports = by_slot(first), range(20_000, 20_040)
    before = {port: slot_of(port) for port in ports}
    orphan(first)
    for slot in range(4, 20):
        (home / f"crash{slot}").touch()
    # In this order their sockets' places in the group end up in another than in the other.
    for slot in (1, 0):
        os.kill(workers[slot], signal.SIGKILL)
        left = {0, 2, 3} - {slot}
        eventually(lambda left=left: answerers() <= left)
    second = service(*arguments, ready=False)
    eventually(lambda: "serving" in second.log)
    assert "worker 0 ended while there was no controller" in second.log
    for port, slot in before.items():
        if backend != "kernel" and slot in (2, 3):
            assert slot_of(port) == slot
    for slot in range(4, 20):
        (home / f"crash{slot}").unlink()
    eventually(lambda: ready(second, 4))
    found = by_slot(second)
    assert {slot: found[slot] for slot in (2, 3)} == {slot: workers[slot] for slot in (2, 3)}
    assert not {0, 1} & set(found)
    assert {slot_of(port) for port in ports} == set(found)


def answerers() -> set[int]:
    """Where nothing migrates, a connection is lost with the worker it waits for."""
    try:
        return set(ask(10))
    except ConnectionResetError:
        return {-1}


def test_order_of_sockets_is_known(service: StartService) -> None:
    """Classic programs speak in it: after deaths nobody saw, every flow has to go where it is
    said to go, and none by chance."""
    arguments = ("-w", str(len(CPUS)), "--policy=cpu", "--backend=cbpf")
    first = service(*arguments)
    for rounds in range(3):
        workers = sorted(by_slot(first).items())
        orphan(first)
        for _, pid in workers[:-1]:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not is_running(pid))
        first = service(*arguments)
        homes = {worker["cpus"][0]: worker["slot"] for worker in first.workers()}
        for cpu in CPUS:
            with pinned(cpu):
                assert ask(8) == [homes[cpu]] * 8, rounds


def test_worker_in_backoff_is_started(service: StartService, script: tuple[str, ...]) -> None:
    home = (first := service("-w", "2", *script)).home
    for slot in range(2, 10):
        (home / f"crash{slot}").touch()
    os.kill(by_slot(first)[1], signal.SIGKILL)
    eventually(lambda: any(worker["state"] == "backoff" for worker in first.workers()))
    eventually(lambda: "failed again" in first.log)
    survivor = by_slot(first)[0]
    orphan(first)
    for slot in range(2, 10):
        (home / f"crash{slot}").unlink()
    second = service("-w", "2", *script)
    assert ready(second)
    assert by_slot(second)[0] == survivor


def test_change_under_way_is_undone(service: StartService, script: tuple[str, ...]) -> None:
    """New workers that were not yet in the table end; old ones serve on."""
    first = service("-w", "2", *script)
    old = by_slot(first)
    (first.home / "wait3").touch()
    with suppress(ControlError), _in_background(first, "reload"):
        eventually(lambda: "worker 2 ready" in first.log and len(by_slot(first)) == 4)
        new = set(by_slot(first).values()) - set(old.values())
        orphan(first)
    assert set(ask(20)) <= {0, 1}
    second = service("-w", "2", *script, ready=False)
    eventually(lambda: "adopted 4 workers" in second.log)
    eventually(lambda: not any(map(is_running, new)))
    (first.home / "wait3").unlink()
    eventually(lambda: by_slot(second) == old)
    assert second.status()["generation"] == 1
    assert second.ask("reload")["generation"] == 2


@contextmanager
def _in_background(running: Service, command: str, **more: Any) -> Iterator[None]:
    """Something is asked, whatever comes of it."""

    def request() -> None:
        with suppress(ControlError):
            running.ask(command, timeout_s=DEADLINE_S, **more)

    thread = threading.Thread(target=request)
    thread.start()
    yield
    thread.join()


def test_old_worker_that_still_finishes_is_adopted_twice(
    service: StartService, script: tuple[str, ...]
) -> None:
    arguments = ("-w", "2", *script)
    first = service(*arguments)
    old = set(by_slot(first).values())
    (first.home / "busy").touch()
    first.ask("reload")
    new = set(by_slot(first).values()) - old
    for _ in range(2):
        orphan(first)
        first = service(*arguments, ready=False)
        eventually(lambda first=first: "serving" in first.log)
        assert set(by_slot(first).values()) == old | new
    (first.home / "busy").unlink()
    eventually(lambda: set(by_slot(first).values()) == new)
    assert not any(map(is_running, old))
    assert first.status()["generation"] == 2


@pytest.mark.needs("bpf")
def test_hanging_worker_goes_on_to_hang_or_is_replaced(
    service: StartService, script: tuple[str, ...], home: Path
) -> None:
    """Not a stopped one: with its parent gone the kernel sends it SIGHUP (setpgid(2))."""
    configure(home, "skip")
    arguments = ("-w", "2", "--policy=round-robin", *script)
    first = service(*arguments)
    victim = by_slot(first)[0]
    (home / "hang0").touch()
    asking = [threading.Thread(target=ask, args=[1]) for _ in range(4)]
    for thread in asking:
        thread.start()
    states = {"ready", "hung"}
    eventually(lambda: {worker["state"] for worker in first.workers()} == states)
    orphan(first)
    second = service(*arguments, ready=False)
    eventually(lambda: "serving" in second.log)
    assert {worker["state"] for worker in second.workers()} == states
    assert set(ask(4)) == {1}
    orphan(second)
    configure(home, "replace")
    third = service(*arguments, ready=False)
    eventually(lambda: "worker 2 ready" in third.log)
    (home / "hang0").unlink()
    for thread in asking:
        thread.join()
    eventually(lambda: ready(third) and victim not in by_slot(third).values())


def configure(home: Path, hang: str) -> None:
    (home / "steer.toml").write_text(f'[service]\nhang_timeout = 0.3\nhang = "{hang}"\n')


def test_service_that_was_ending_ends(service: StartService, script: tuple[str, ...]) -> None:
    first = service("-w", "2", *script)
    workers = by_slot(first)
    (first.home / "busy").touch()
    first.send_signal(signal.SIGTERM)
    eventually(lambda: "stopping gracefully" in first.log)
    eventually(lambda: {worker["state"] for worker in first.workers()} == {"stopping"})
    orphan(first)
    assert "ending 2 workers" in refused("-w", "2", *script, running=first)
    (first.home / "busy").unlink()
    eventually(lambda: not any(map(is_running, workers.values())))
    eventually(lambda: not first.control_socket.exists())


TELLER = source("teller")


def test_who_tells_something_does_not_wait(service: StartService, home: Path) -> None:
    """The queue of the socket is short, and most clients of sd_notify(3) block."""
    (home / "teller.py").write_text(TELLER)
    arguments = ("-w", "1", "--watchdog=60", "--", "python3", "teller.py")
    orphan(service(*arguments))
    told = int(eventually((home / "told").read_text))
    eventually(lambda: int((home / "told").read_text() or 0) > told + 30)
    second = service(*arguments)
    eventually(lambda: int(second.workers()[0]["said"]) > told + 30)


def test_what_was_told_is_heard_later(service: StartService, home: Path) -> None:
    script = """
import os, pathlib, socket, time
address = os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1)
teller = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener = socket.socket(fileno=3)
pathlib.Path("there").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.01)
teller.sendto(b"READY=1\\nSTATUS=here", address)
pathlib.Path("told").touch()
while True:
    time.sleep(1)
"""
    (home / "late.py").write_text(script)
    arguments = ("-w", "1", "--ready-timeout=60", "--", "python3", "late.py")
    first = service(*arguments, ready=False)
    eventually((home / "there").exists)
    eventually(lambda: first.status()["state"] == "starting")
    orphan(first)
    (home / "go").touch()
    eventually((home / "told").exists)
    eventually(lambda: "1 worker still serving" in orphaned_words(first))
    second = service(*arguments, ready=False)
    eventually(lambda: "adopted 1 worker\n" in second.log)
    eventually(lambda: second.workers()[0]["said"] == "here")


# The configuration is another.


def test_scaled_service_keeps_its_number(service: StartService) -> None:
    first = service("-w", "2")
    first.ask("scale", workers=4)
    eventually(lambda: ready(first, 4))
    workers = by_slot(first)
    orphan(first)
    second = service("-w", "2")
    assert by_slot(second) == workers
    assert second.status()["generation"] == 1
    second.ask("reload")
    eventually(lambda: ready(second, 2))


@pytest.mark.parametrize("change, keys", [("reload", {}), ("scale", {"workers": 4})])
def test_those_that_came_with_a_change_stay(
    service: StartService, script: tuple[str, ...], change: str, keys: dict[str, int]
) -> None:
    """However soon after it the controller ends: the first was last saved while it was held."""
    first = service("-w", "2", *script)
    wait = first.home / "wait3"
    wait.touch()
    with _in_background(first, change, **keys):
        eventually(lambda: "worker 2 ready" in first.log and 3 in by_slot(first))
        wait.unlink()
    came = {slot: pid for slot, pid in by_slot(first).items() if slot > 1}
    orphan(first)
    second = service("-w", "2", *script)
    assert {slot: pid for slot, pid in by_slot(second).items() if slot > 1} == came
    serving = {each["slot"] for each in second.workers() if each["state"] == "ready"}
    assert set(came) <= serving


def test_scaling_that_was_not_finished_is_undone(
    service: StartService, script: tuple[str, ...]
) -> None:
    first = service("-w", "2", *script)
    workers = by_slot(first)
    (first.home / "wait3").touch()
    with _in_background(first, "scale", workers=4):
        eventually(lambda: "worker 2 ready" in first.log and 3 in by_slot(first))
        orphan(first)
    second = service("-w", "2", *script, ready=False)
    eventually(lambda: "adopted" in second.log and by_slot(second) == workers)


@pytest.mark.parametrize(
    "change, keys",
    [
        (("-w", "3"), "workers"),
        (("-w", "2", "-e", "COLOUR=blue"), "env"),
        (("-w", "2", "--policy=source", "--param=prefix4=24"), "policy, params"),
    ],
)
def test_changes_to_the_configuration_as_it_is(
    service: StartService, change: tuple[str, ...], keys: str
) -> None:
    first = service("-w", "2")
    old = set(by_slot(first).values())
    with Load(clients=2) as load:
        orphan(first)
        second = service(*change)
        eventually(lambda: second.status()["generation"] == 2)
        eventually(lambda: ready(second, int(change[1])))
        load.goes_on()
    assert load.failures == []
    assert not old & set(by_slot(second).values())
    assert f"changing to the new configuration: {keys}\n" in second.log
    assert second.status()["policy"] == ("source" if "policy" in keys else "least-conn")
    workers = by_slot(second)
    orphan(second)
    third = service(*change)
    assert by_slot(third) == workers
    assert "changing to" not in third.log


def test_change_that_does_not_come_up_leaves_the_old(
    service: StartService, script: tuple[str, ...]
) -> None:
    first = service("-w", "2", *script)
    workers = by_slot(first)
    orphan(first)
    for slot in range(2, 10):
        (first.home / f"crash{slot}").touch()
    second = service("-w", "3", *script)
    eventually(lambda: "as it was told to" in second.log)
    eventually(lambda: "change to the new configuration" in second.log)
    # Two start at once: when one has failed, the other is still being stopped.
    eventually(lambda: by_slot(second), workers)
    assert second.status()["generation"] == 1


CANNOT_CHANGE = {
    ("-b", f"{HOST}:9999"): f"bind is {HOST}:{PORT} and would be {HOST}:9999",
    ("--backend=cbpf",): "backend is 'auto' and would be 'cbpf'",
    ("--pid=pid",): "pid is None and would be 'pid'",
    ("-w", "900"): "started with capacity for 128",
}


def test_what_cannot_change_live_is_refused(service: StartService) -> None:
    arguments = ("-w", "2", "--policy=hash")
    first = service(*arguments)
    workers = by_slot(first)
    orphan(first)
    for change, words in CANNOT_CHANGE.items():
        assert words in refused(*arguments, *change, running=first)
        assert "2 workers still serving" in orphaned_words(first)
    assert set(ask(20)) == {0, 1}
    assert by_slot(service(*arguments)) == workers


def test_adoption_that_fails_late_has_changed_nothing(service: StartService, home: Path) -> None:
    arguments = ("-w", "2", f"--pid={home}/pid")
    first = service(*arguments)
    workers = by_slot(first)
    orphan(first)
    (home / "pid").write_text(f"{os.getpid()}\n")
    assert "names a running process" in refused(*arguments, running=first)
    assert "2 workers still serving" in orphaned_words(first)
    (home / "pid").unlink()
    assert by_slot(service(*arguments)) == workers


@pytest.mark.parametrize(
    "number",
    ["steer.abi.MAPS_VERSION", "steer.controller.persisted.SCHEMA"],
    ids=["maps", "schema"],
)
def test_what_another_version_left_is_not_understood(
    service: StartService, home: Path, environment: dict[str, str], number: str
) -> None:
    """But not harmed, either."""
    first = service("-w", "2")
    workers = by_slot(first)
    orphan(first)
    environment["PYTHONPATH"] = str(home)
    site = home / "sitecustomize.py"
    site.write_text(f"import {number.rpartition('.')[0]}; {number} += 1")
    assert "another version" in refused("-w", "2", running=first)
    site.unlink()
    assert by_slot(service("-w", "2")) == workers


def test_another_name_on_the_port_is_refused(service: StartService) -> None:
    first = service("-w", "2")
    pid = by_slot(first)[0]
    orphan(first)
    other = start_service("-w", "2", name="other", environment=first.environment, home=first.home)
    assert other.wait() == 1
    assert "EADDRINUSE" in other.log
    assert f"steer-worker (pid {pid})" in other.log
    service("-w", "2")


# Re-executed.


def test_same_process_is_another_program(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    environment["PYTHONPATH"] = str(home)
    (home / "sitecustomize.py").write_text(MARKER.format("one"))
    running = service("-w", "2", f"--pid={home}/pid", "--adopt-timeout=300")
    workers, began = by_slot(running), processes.start_time_ticks(running.pid)
    (home / "sitecustomize.py").write_text(MARKER.format("two"))
    with Load() as load, Asking(running) as asking:
        running.send_signal(signal.SIGUSR2)
        eventually(lambda: "adopted 2 workers" in running.log)
        eventually(lambda: asking.answers_of_late("running"))
        load.goes_on()
    assert load.failures == []
    assert asking.failures == []
    assert running.log.count("image one") == 1
    assert running.log.count("image two") == 1
    assert by_slot(running) == workers
    assert processes.start_time_ticks(running.pid) == began
    assert running.status()["pid"] == running.pid
    assert (home / "pid").read_text() == f"{running.pid}\n"
    os.kill(workers[0], signal.SIGKILL)
    eventually(lambda: ready(running) and 0 not in by_slot(running))
    assert running.stop() == 0
    assert not (home / "pid").exists()


def test_worker_that_dies_meanwhile_is_waited_for(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    """It is a child of ours still."""
    environment["PYTHONPATH"] = str(home)
    site, slow = home / "sitecustomize.py", home / "slow"
    site.touch()
    running = service("-w", "2")
    victim = by_slot(running)[0]
    slow.touch()
    site.write_text(MARKER.format("new") + SLOW)
    running.send_signal(signal.SIGUSR2)
    eventually(lambda: "image new" in running.log)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: not is_running(victim))
    assert set(ask(5)) == {1}
    slow.unlink()
    eventually(lambda: sorted(by_slot(running)) == [1, 2] and ready(running))
    assert not Path(f"/proc/{victim}").exists()


SLOW = """
import pathlib, time
while "--check-config" not in sys.orig_argv and pathlib.Path("slow").exists():
    time.sleep(0.01)
"""


class Asking:
    """Somebody who asks for the status all the time."""

    def __init__(self, running: Service) -> None:
        self.failures: list[str] = []
        self._running = running
        self._last = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._over.wait(_PAUSE_S):
            try:
                self._last = self._running.status()["state"]
            except ControlError as error:
                self._last = ""
                self.failures.append(str(error))

    def answers_of_late(self, state: str) -> bool:
        return self._last == state

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_again_and_again_leaks_nothing(service: StartService) -> None:
    running = service("-w", "2")
    counts: tuple[int, ...] = ()
    limits = set()
    for number in range(1, 8):
        running.send_signal(signal.SIGUSR2)
        eventually(lambda number=number: running.log.count("adopted 2 workers") == number)
        running.wait_ready()
        family = processes.descendants(running.pid)
        assert len(family) == 4  # the controller, its guard, two workers
        assert not [pid for pid in family if not is_running(pid)]
        if number == 1:
            counts = least_descriptors(running.pid, guard_of(running))
        if number > 1:
            # A connection may just be open.
            eventually(lambda: least_descriptors(running.pid, guard_of(running)), counts)
            running.ask("restart", slot=max(by_slot(running)))
            eventually(lambda: ready(running))
            limits.add(_files(max(by_slot(running).values())))
    assert len(limits) == 1, limits


def least_descriptors(*pids: int) -> tuple[int, ...]:
    """How many files are open; some may be for a moment."""
    looks = [tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids) for _ in range(20)]
    return min(looks)


def _files(pid: int) -> str:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith("Max open files"))


@pytest.mark.parametrize(
    "trouble, words",
    [
        ("file", "unknown key"),
        ("timeout", "workers would end"),
        ("guard", "guard process"),
    ],
)
def test_old_program_goes_on(service: StartService, home: Path, trouble: str, words: str) -> None:
    zero = ("--adopt-timeout=0",) if trouble == "timeout" else ()
    running = service("-w", "2", *zero)
    workers = by_slot(running)
    guard = guard_of(running)
    if trouble == "file":
        (home / "steer.toml").write_text("[service]\nno_such_key = 1\n")
    if trouble == "guard":
        os.kill(guard, signal.SIGSTOP)
    running.send_signal(signal.SIGUSR2)
    eventually(lambda: words in running.log)
    (home / "steer.toml").unlink(missing_ok=True)
    assert "re-executing" not in running.log
    assert by_slot(running) == workers
    assert running.status()["state"] == "running"
    if trouble == "guard":
        eventually(lambda: guard not in processes.descendants(running.pid))


# Nobody adopts.


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("timeout", ["0", "1"])
def test_workers_end_in_time(service: StartService, home: Path, timeout: str) -> None:
    running = service("-w", "2", f"--adopt-timeout={timeout}", f"--pid={home}/pid")
    orphan(running)
    if timeout != "0":
        eventually(lambda: "2 workers still serving, for 1 s" in running.log)
    eventually(lambda: session(running.pid), [])
    assert not running.control_socket.exists()
    assert not (home / "pid").exists()
    running.leaves_nothing()


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_stop(service: StartService, home: Path, steer: RunSteer, quick: tuple[str, ...]) -> None:
    running = service("-w", "2", "--adopt-timeout=300", f"--pid={home}/pid")
    orphan(running)
    assert steer("stop", "test", *quick).returncode == 0
    assert session(running.pid) == []
    assert not running.control_socket.exists()
    assert not (home / "pid").exists()


def test_killed_guard_is_replaced_and_hands_over(service: StartService) -> None:
    first = service("-w", "2")
    workers = by_slot(first)
    old = guard_of(first)
    os.kill(old, signal.SIGKILL)
    eventually(lambda: "the guard process was killed" in first.log)
    eventually(lambda: len(processes.descendants(first.pid)) == 4 and guard_of(first) != old)
    first.status()  # answered once the new guard has been told everything
    orphan(first)
    assert by_slot(service("-w", "2")) == workers


# Who adopts.


def test_one_adopts(service: StartService) -> None:
    first = service("-w", "2")
    workers = by_slot(first)
    for _ in range(3):
        orphan(first)
        racing = [service("-w", "2", ready=False) for _ in range(2)]
        loser = eventually(lambda racing=racing: lost(racing))
        assert loser is not None
        assert "adopts it" in loser.log or "one of that name is running" in loser.log, loser.log
        (first,) = (one for one in racing if one is not loser)
        first.wait_ready()
        assert by_slot(first) == workers


def lost(racing: list[Service]) -> Service | None:
    return next((one for one in racing if one.process.poll() == 1), None)


@pytest.mark.needs("nobody")
def test_other_users_service_is_not_adopted(service: StartService) -> None:
    orphan(service("-w", "2", "--adopt-timeout=300"))
    other = service("-w", "2", ready=False, user=NOBODY)
    assert other.wait() == 1
    service("-w", "2")


@pytest.mark.needs("nobody")
def test_no_privilege_is_needed(service: StartService) -> None:
    arguments = ("-w", "3", "--policy=random")
    first = service(*arguments, user=NOBODY)
    assert first.status()["backend"] == "cbpf"
    workers = by_slot(first)
    with Load(clients=2) as load:
        orphan(first)
        load.goes_on()
        second = service(*arguments, user=NOBODY)
        load.goes_on()
    assert load.failures == []
    assert by_slot(second) == workers


# At any moment.

DIES = source("dies_at_a_step")


@pytest.fixture
def mortal(home: Path, environment: dict[str, str]) -> Callable[[int], None]:
    """Have controllers started from now on die at their n-th step of some kind; 0: not."""
    (home / "sitecustomize.py").write_text(DIES)
    environment["PYTHONPATH"] = str(home)

    def die_at(step: int) -> None:
        environment["DIE_AT"] = str(step)

    return die_at


def check_in_order(first: Service, second: Service, workers: int) -> int:
    """Of what the first left there is nobody but those whom the second knows.

    Returns:
        How many requests that took.
    """
    assert len(second.workers()) == workers
    ours = {*by_slot(second).values(), guard_of(second), second.pid}
    eventually(lambda: set(session(first.pid)) <= ours)
    slots = set(by_slot(second))
    assert len(slots) == workers
    answers = ask(20)
    while set(answers) != slots and len(answers) < 1000:
        answers += ask(20)
    assert set(answers) == slots
    return len(answers)


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("step", [1, *range(24, 33)])
def test_killed_while_it_starts(
    service: StartService, home: Path, mortal: Callable[[int], None], step: int
) -> None:
    """The steps of starting four workers are about 50; those of one of them are all here."""
    arguments = ("-w", "4", "--policy=round-robin")
    (home / "armed").touch()
    mortal(step)
    first = service(*arguments, ready=False)
    assert first.wait() == -signal.SIGKILL
    mortal(0)
    check_in_order(first, service(*arguments), 4)


@pytest.mark.parametrize(
    "backend, step", [*(("auto", n) for n in range(8, 50, 13)), ("cbpf", 13), ("cbpf", 30)]
)
def test_killed_while_it_reloads(
    service: StartService, home: Path, mortal: Callable[[int], None], backend: str, step: int
) -> None:
    """The steps of replacing two workers are about 50."""
    arguments = ("-w", "2", "--policy=random", f"--backend={backend}", "--graceful-timeout=5")
    mortal(step)
    first = service(*arguments)
    mortal(0)
    with Load(clients=2) as load:
        (home / "armed").touch()
        with _in_background(first, "reload"):
            assert first.wait() == -signal.SIGKILL
        second = service(*arguments)
        eventually(lambda: ready(second))
        asked = check_in_order(first, second, 2)
    assert load.failures == []
    totals = second.status()["totals"]
    if totals["selected"] is not None:
        assert totals["selected"] - totals["migrated"] == load.answered.total() + asked
