"""Changes to a running service: reload, scale, drain, restart, by command and by signal.

What clients see of them, counted, and what is left when one fails.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from steer.control import peer
from steer.errors import Refused
from steer.linux import activity, processes
from testkit.clients import http_get
from testkit.fixtures import RunSteer, StartService
from testkit.processes import DEADLINE_S, descriptors, eventually, is_ready, is_running, session
from testkit.programs import source
from testkit.service import STEER, Service

PORT = 8080
APP = source("of_a_version")
BROKEN = "import no_such_module\n"


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


class Answer(NamedTuple):
    begun_s: float
    ended_s: float
    slot: int
    pid: int
    generation: int


class Clients:
    """Each asks again and again, in a connection of its own each time."""

    def __init__(self, number: int) -> None:
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(number)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _ask(self) -> None:
        while not self._over.is_set():
            begun_s = time.monotonic()
            try:
                found = http_get("127.0.0.1", PORT)[1]
            except (OSError, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            who = (found["slot"], found["pid"], found.get("generation", 0))
            self.answers.append(Answer(begun_s, time.monotonic(), *who))

    def get(self, more: int) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + more
        eventually(lambda: self.failures or len(self.answers) >= wanted)
        assert not self.failures

    def pids(self) -> set[int]:
        return {answer.pid for answer in self.answers}


@contextmanager
def asking(running: Service, command: str, **more: Any) -> Iterator[Future[dict[str, Any]]]:
    """Have something done meanwhile; the result may be waited for inside or after."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(running.ask, command, timeout_s=None, **more)


def ask() -> dict[str, Any]:
    return http_get("127.0.0.1", PORT)[1]


def pids(running: Service, state: str = "") -> set[int]:
    return {each["pid"] for each in running.workers() if state in ("", each["state"])}


def slots(running: Service, state: str = "") -> list[int]:
    return [each["slot"] for each in running.workers() if state in ("", each["state"])]


def reload_by_hangup(running: Service) -> None:
    wanted = running.status()["generation"] + 1
    running.send_signal(signal.SIGHUP)
    eventually(lambda: running.status()["generation"], wanted)


def refusal(running: Service, command: str, **more: Any) -> str:
    with pytest.raises(Refused) as caught:
        running.ask(command, timeout_s=None, **more)
    assert caught.value.exit_code == 1
    return str(caught.value)


def gone(before: set[int]) -> bool:
    return not any(map(is_running, before))


def is_as_before(running: Service, before: list[dict[str, Any]]) -> bool:
    """The same workers, and no process but theirs, the controller and the guard."""
    same = ("slot", "pid", "state", "generation", "restarts")
    return [[each[key] for key in same] for each in running.workers()] == [
        [each[key] for key in same] for each in before
    ] and len(session(running.pid)) == len(before) + 2


# Reload


def test_reload_returns_when_new_workers_serve(service: StartService) -> None:
    running = service("-w", "2", "--policy", "round-robin")
    before = running.workers()

    done = running.steer("reload", "test", "--json")

    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert {**outcome, "took_s": 0} == {
        "reloaded": "test",
        "generation": 2,
        "workers": 2,
        "took_s": 0,
    }
    assert {ask()["generation"] for _ in range(10)} == {2}
    status = running.status()
    assert (status["generation"], status["state"]) == (2, "running")
    eventually(lambda: gone({each["pid"] for each in before}))
    eventually(lambda: len(running.workers()), 2)
    assert not set(slots(running)) & {each["slot"] for each in before}
    assert [each["restarts"] for each in running.workers()] == [0, 0]


def test_reload_tells_what_it_did(service: StartService) -> None:
    running = service("-w", "1")
    done = running.steer("reload")
    assert done.stdout.startswith("reloaded test: generation 2, 1 worker, ")
    assert "generation 2 serves" in running.log


@contextmanager
def held(home: Path) -> Iterator[socket.socket]:
    """A request that is not answered before there is a file "go"."""
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        sock.sendall(b"GET /held HTTP/1.1\r\n\r\n")
        eventually((home / "under-way").exists)
        yield sock


def test_request_under_way_at_an_old_worker_is_answered(service: StartService, home: Path) -> None:
    running = service("app:serve", "-w", "1")
    (old,) = pids(running)
    with held(home) as sock:
        running.ask("reload", timeout_s=None)
        eventually(lambda: pids(running, "stopping"), {old})
        assert {ask()["generation"] for _ in range(10)} == {2}
        (home / "go").touch()
        with sock.makefile("rb") as answer:
            found = json.loads(answer.read().partition(b"\r\n\r\n")[2])
    assert (found["pid"], found["generation"]) == (old, 1)
    eventually(lambda: gone({old}))
    assert "WARNING" not in running.log


def test_old_worker_that_does_not_finish_is_killed_in_time(
    service: StartService, home: Path
) -> None:
    """In that of the new configuration."""
    (home / "steer.toml").write_text("[service]\ngraceful_timeout = 1000\n")
    running = service("app:serve", "-w", "1")
    (old,) = pids(running)
    with held(home) as sock:
        (home / "steer.toml").write_text("[service]\ngraceful_timeout = 0.2\n")
        running.ask("reload", timeout_s=None)
        eventually(lambda: gone({old}))
        assert sock.recv(100) == b""
    assert "worker 0: not finished in time: killed" in running.log


def check_counts(running: Service, clients: Clients) -> None:
    """Every request was answered once, and was counted once."""
    assert clients.failures == []
    totals = running.status()["totals"]
    assert totals["selected"] - totals["migrated"] == len(clients.answers)
    assert (totals["fallback"], totals["unsteered"]) == (0, 0)


@pytest.mark.needs("bpf", "migrate")
@pytest.mark.parametrize("policy", ["cpu", "round-robin"])
def test_every_request_is_answered_and_counted_once(service: StartService, policy: str) -> None:
    running = service("-w", "2", "--policy", policy)
    with Clients(6) as clients:
        clients.get(50)
        for workers in (4, 1, 3):
            running.ask("reload", timeout_s=None)
            running.ask("scale", workers=workers, timeout_s=None)
            clients.get(50)
    check_counts(running, clients)
    assert {each.generation for each in clients.answers} == {1, 2, 3, 4}


@pytest.mark.needs("bpf", "migrate")
@pytest.mark.parametrize(
    "server",
    [
        pytest.param(("uvicorn", "asgi:app", "--fd", "{fd}"), marks=pytest.mark.needs("uvicorn")),
        pytest.param(("gunicorn", "wsgi:app"), marks=pytest.mark.needs("gunicorn")),
    ],
    ids=["uvicorn", "gunicorn"],
)
def test_servers_lose_nothing(service: StartService, home: Path, server: tuple[str, ...]) -> None:
    body = "json.dumps({'slot': int(os.environ['STEER_SLOT']), 'pid': os.getpid()}).encode()"
    (home / "wsgi.py").write_text(
        "import json, os\n"
        "def app(environ, start_response):\n"
        f"    body = {body}\n"
        "    start_response('200 OK', [('content-length', str(len(body)))])\n"
        "    return [body]\n"
    )
    (home / "asgi.py").write_text(
        "import json, os\n"
        "async def app(scope, receive, send):\n"
        "    if scope['type'] != 'http': raise ValueError\n"
        f"    body = {body}\n"
        "    headers = [(b'content-length', b'%d' % len(body))]\n"
        "    await send({'type': 'http.response.start', 'status': 200, 'headers': headers})\n"
        "    await send({'type': 'http.response.body', 'body': body})\n"
    )
    command = (sys.executable, "-m", *server)
    # New workers are nicer than what the clients keep busy: that leaves them little of two CPUs.
    options = ("-w", "2", "--policy", "round-robin", "--ready-timeout", "100")
    running = service(*options, "--", *command)
    with Clients(4) as clients:
        clients.get(50)
        running.ask("reload", timeout_s=None)
        clients.get(50)
        running.ask("scale", workers=1, timeout_s=None)
        clients.get(50)
    check_counts(running, clients)
    assert {each.slot for each in clients.answers} == {0, 1, 2, 3}


# Ready before retire


def test_nothing_goes_to_a_new_worker_before_all_are_ready(
    service: StartService, home: Path
) -> None:
    running = service("app:slow", "-w", "2", "--policy", "round-robin")
    old = pids(running)
    with Clients(4) as clients, asking(running, "reload") as reload:
        for slot in (2, 3):
            eventually(lambda slot=slot: slot in slots(running, "starting"))
            clients.get(40)
            (home / f"go-{slot}").touch()
        reload.result(DEADLINE_S)
        begun_s = time.monotonic()
        clients.get(40)
    assert clients.failures == []
    first = [each for each in clients.answers if each.generation == 1]
    second = [each for each in clients.answers if each.generation == 2]
    assert {each.pid for each in first} <= old
    assert {each.slot for each in second} == {2, 3}
    # In one step: none was asked for after one of the others was answered.
    assert max(each.begun_s for each in first) <= min(each.ended_s for each in second)
    assert max(each.begun_s for each in first) <= begun_s


def test_worker_that_is_ready_is_held_and_shown_as_starting(
    service: StartService, home: Path
) -> None:
    running = service("app:slow", "-w", "2")
    with asking(running, "reload") as reload:
        (home / "go-2").touch()
        eventually(lambda: "worker 2 ready" in running.log)
        eventually(lambda: slots(running), [0, 1, 2, 3])
        assert slots(running, "starting") == [2, 3]
        assert {ask()["generation"] for _ in range(10)} == {1}
        (home / "go-3").touch()
        assert reload.result(DEADLINE_S)["generation"] == 2
    assert {ask()["generation"] for _ in range(10)} == {2}


def niceness(running: Service, slot: int) -> int:
    (pid,) = (each["pid"] for each in running.workers() if each["slot"] == slot)
    return os.getpriority(os.PRIO_PROCESS, pid)


@pytest.mark.parametrize("own, meanwhile", [(0, 10), (-15, -5), (15, 19)])
def test_new_worker_is_nicer_than_the_service_until_it_is_ready(
    service: StartService, home: Path, own: int, meanwhile: int
) -> None:
    """However nice that is itself."""
    with asking(niced := service("app:slow", "-w", "1", under=("nice", "-n", f"{own}")), "reload"):
        eventually(lambda: slots(niced), [0, 1])
        eventually(lambda: niceness(niced, 1), meanwhile)
        (home / "go-1").touch()
        eventually(lambda: slots(niced), [1])
        assert niceness(niced, 1) == own


# Failure changes nothing


UNCHANGED = "nothing has changed: generation 1 serves on"
NO_MODULE = "No module named 'no_such_module'"


@pytest.mark.parametrize(
    "app, code, words",
    [
        ("exits", 3, f"start workers: exit status 7; {UNCHANGED}\n  | out of order\n"),
        ("never_ready", 3, "start workers: not ready within 2 s; see ready_timeout"),
        ("serve", 4, f"load app:serve: ModuleNotFoundError: {NO_MODULE}; {UNCHANGED}"),
    ],
)
def test_reload_whose_workers_do_not_come_up_changes_nothing(
    service: StartService, home: Path, app: str, code: int, words: str
) -> None:
    running = service(f"app:{app}", "-w", "2", "--ready-timeout", "2")
    before = running.workers()
    if app == "serve":
        (home / "app.py").write_text(BROKEN)

    with Clients(2) as clients:
        done = running.steer("reload", "test")
        clients.get(20)

    assert done.returncode == code
    assert done.stderr.startswith(f"steer: reload test: {words}")
    assert ("  | out of order\n" in done.stderr) == (code == 3)
    assert "[WARNING] request reload refused: reload test: " in running.log
    assert "[WARNING] worker " not in running.log, "who asked is told, once"
    assert clients.failures == []
    assert clients.pids() <= {each["pid"] for each in before}
    eventually(lambda: is_as_before(running, before))
    assert running.status()["generation"] == 1
    if app == "serve":
        (home / "app.py").write_text(APP)
        assert running.ask("reload", timeout_s=None)["generation"] == 2


def test_reload_that_fails_before_any_worker_was_ready_does_not_say_that_one_serves(
    service: StartService, home: Path
) -> None:
    running = service("app:nothing", "-w", "1", "--ready-timeout", "3600", ready=False)
    running.wait_asked()
    (home / "app.py").write_text(BROKEN)
    done = running.steer("reload", "test")
    assert done.returncode == 4
    assert "nothing has changed: generation 1 goes on, and no worker of it is ready" in done.stderr
    assert running.stop(signal.SIGINT) == 0


def test_reload_by_a_signal_that_fails_is_one_error(service: StartService, home: Path) -> None:
    running = service("app:serve", "-w", "2")
    (home / "app.py").write_text(BROKEN)
    running.send_signal(signal.SIGHUP)
    eventually(lambda: UNCHANGED in running.log)
    (line,) = [line for line in running.log.splitlines() if "[ERROR]" in line and " | " not in line]
    assert (
        f"[ERROR] cannot reload: reload test: load app:serve: ModuleNotFoundError: {NO_MODULE}"
        in line
    )


def test_replacement_that_a_stop_ends_is_no_error(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    options = ("--policy=round-robin", "--hang-timeout=0.3", "-w", "2")
    running = service(*options, "app:first_two")
    os.kill(running.workers()[0]["pid"], signal.SIGSTOP)
    while len(slots(running)) < 3:
        clients.enter_context(socket.create_connection(("127.0.0.1", PORT), DEADLINE_S))
    assert running.steer("stop", "--quick").returncode == 0
    assert running.wait() == 0
    assert "ERROR" not in running.log


def test_worker_that_ends_while_others_get_ready_is_not_counted_in(
    service: StartService, home: Path
) -> None:
    running = service("app:slow", "-w", "2")
    before = running.workers()
    with asking(running, "reload") as reload:
        (home / "go-2").touch()
        eventually(lambda: slots(running), [0, 1, 2, 3])
        eventually(lambda: "worker 2 ready" in running.log)
        (ended,) = (each["pid"] for each in running.workers() if each["slot"] == 2)
        os.kill(ended, signal.SIGKILL)
        with pytest.raises(Refused, match="start workers: killed by SIGKILL") as caught:
            reload.result(DEADLINE_S)
    assert caught.value.exit_code == 3
    eventually(lambda: is_as_before(running, before))


# What a reload reads


def configure(home: Path, **keys: object) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    (home / "steer.toml").write_text("\n".join(["[service]", *lines]))


def test_reload_reads_the_configuration_anew(service: StartService, home: Path) -> None:
    configure(home, app="app:serve", workers=1, env=["A=1"])
    running = service()
    assert [ask()[key] for key in ("app", "A", "generation")] == ["serve", "1", 1]

    configure(home, app="app:other", workers=3, env=["A=2"], weights=[5], log_level="warning")
    running.ask("reload", timeout_s=None)

    assert [ask()[key] for key in ("app", "A", "generation")] == ["other", "2", 2]
    fresh = [each for each in running.workers() if each["generation"] == 2]
    assert [each["weight"] for each in fresh] == [5, 1, 1]
    assert "generation 2 serves" not in running.log

    (home / "steer.toml").unlink()
    done = running.steer("reload")
    assert (done.returncode, done.stderr) == (1, "steer: read steer.toml: no such file\n")


@pytest.mark.parametrize("left", ["[service]\nworkers = 2\n", "[service]\n", ""])
def test_a_file_that_lost_its_application_is_refused(
    service: StartService, home: Path, environment: dict[str, str], left: str
) -> None:
    """Instead of the demo in its place."""
    del environment["STEER_DEMO"]
    configure(home, app="app:serve", workers=1)
    running = service()
    (home / "steer.toml").write_text(left)
    done = running.steer("reload")
    words = "steer: find what to run in steer.toml, --name: neither an app nor a command is given"
    assert done.returncode == 1
    assert done.stderr.startswith(words)
    assert [ask()[key] for key in ("app", "generation")] == ["serve", 1]


def test_an_emptied_file_gives_no_demo_without_any_option(
    netns: object, home: Path, environment: dict[str, str]
) -> None:
    """Which `service` gives."""
    del environment["STEER_DEMO"]
    configure(home, app="app:serve", workers=1)
    with subprocess.Popen([STEER, "run", "-c", "steer.toml"], env=environment, cwd=home) as process:
        running = Service(process, "app", home, home, environment)
        try:
            (home / "stderr").touch()
            running.wait_ready()
            (home / "steer.toml").write_text("")
            done = running.steer("reload")
            words = "steer: find what to run in steer.toml: neither an app nor a command is given"
            assert (done.returncode, done.stderr.startswith(words)) == (1, True)
            assert {each["generation"] for each in running.workers()} == {1}
        finally:
            process.terminate()
            assert process.wait(DEADLINE_S) == 0


@pytest.mark.needs("root")
def test_another_user_is_heard_from_then_on(service: StartService, home: Path) -> None:
    configure(home, app="app:notifies", user="1")
    running = service("-w", "1", "--ready-timeout", "10")
    configure(home, app="app:notifies", user="nobody")
    assert running.ask("reload", timeout_s=None)["generation"] == 2


@pytest.mark.parametrize("command", ["reload", "SIGHUP"])
def test_policy_params_and_weights_follow_the_configuration(
    service: StartService, home: Path, command: str
) -> None:
    configure(home, policy="hash")
    running = service("-w", "2")
    with Clients(2) as clients:
        clients.get(20)
        before = running.status()["totals"]["selected"]
        configure(home, policy="source", params=["prefix4=24"], weights=[2, 3])
        if command == "SIGHUP":
            reload_by_hangup(running)
        else:
            assert running.ask("reload", timeout_s=None)["generation"] == 2
        clients.get(20)
    status = running.status()
    assert (status["policy"], status["backend"]) == ("source", "ebpf")
    assert status["params"] == {"prefix4": 24, "prefix6": 64}
    fresh = [each for each in status["workers"] if each["generation"] == 2]
    assert [each["weight"] for each in fresh] == [2, 3]
    assert status["totals"]["selected"] >= before + 20
    # One client, one address: one worker.
    assert len({answer.pid for answer in clients.answers[-10:]}) == 1


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"policy": "fastest"}, "steer.toml: policy = 'fastest': unknown policy"),
        ({"params": ["prefix4=24"]}, "reload test: no parameter 'prefix4' (of 'prefix4=24')"),
        (
            {"policy": "source", "params": ["prefix4=33"]},
            "reload test: parameter prefix4 = '33'; allowed: whole numbers from 0 to 32",
        ),
        ({"policy": "missing.c"}, "read {home}/missing.c: No such file or directory"),
        ({"policy": "kernel", "weights": [1, 2]}, "steer.toml: weights = '1,2' and policy = "),
    ],
)
def test_policy_that_cannot_be_leaves_the_old(
    service: StartService, home: Path, keys: dict[str, Any], said: str
) -> None:
    configure(home, policy="hash")
    running = service("-w", "2")
    before, status = running.workers(), running.status()
    configure(home, **{"policy": "hash", **keys})
    assert refusal(running, "reload").startswith(said.format(home=home))
    assert is_as_before(running, before)
    after = running.status()
    assert [after[key] for key in ("policy", "generation")] == ["hash", status["generation"]]
    assert ask()["generation"] == 1


def test_policy_of_workers_that_do_not_come_up_is_taken_back(
    service: StartService, home: Path
) -> None:
    """It was in force for the old ones meanwhile: `cpu` had them pinned."""
    configure(home, app="app:serve", policy="hash")
    running = service("-w", "2")
    before, cpus = running.workers(), [each["cpus"] for each in running.workers()]
    configure(home, app="app:exits", policy="cpu")
    with Clients(2) as clients:
        clients.get(20)
        with pytest.raises(Refused, match="start workers: exit status 7; nothing has changed"):
            running.ask("reload", timeout_s=None)
        clients.get(20)
    assert is_as_before(running, before)
    assert running.status()["policy"] == "hash"
    assert [each["cpus"] for each in running.workers()] == cpus
    assert all(os.sched_getaffinity(each["pid"]) == set(each["cpus"]) for each in before)


def test_what_cannot_change_live_is_named_and_refused(service: StartService, home: Path) -> None:
    configure(home, bind=["127.0.0.1:8080"])
    running = service("-w", "2")
    before = running.workers()
    for key, old, new in [
        ("bind", ["127.0.0.1:8080"], ["127.0.0.1:8080", "127.0.0.1:8081"]),
        ("backend", "auto", "kernel"),
        ("strict", False, True),
        ("pid", None, str(home / "pid")),
        ("control_socket", None, str(home / "sock")),
    ]:
        configure(home, **{key: new})
        shown = [", ".join(each) if isinstance(each, list) else repr(each) for each in (old, new)]
        assert refusal(running, "reload") == (
            f"reload test: {key} is {shown[0]} and would be {shown[1]}, which cannot "
            f"change live; stop and start it, or put {key} back"
        )
    configure(home, workers=0)
    assert refusal(running, "reload").startswith("steer.toml: workers = 0: ")
    configure(home, user="no-such-user")
    assert refusal(running, "reload") == "run workers as user 'no-such-user': no such user"
    assert is_as_before(running, before)
    assert "bug" not in running.log


# Scale


def test_scale_up_and_down(service: StartService) -> None:
    running = service("-w", "2", "--policy", "round-robin")
    two = pids(running)
    done = running.steer("scale", "4")
    assert done.stdout.startswith("scaled test: 4 workers, ")
    assert pids(running, "ready") > two
    assert {ask()["slot"] for _ in range(40)} == {0, 1, 2, 3}

    done = running.steer("scale", "test", "1", "--json")
    assert {**json.loads(done.stdout), "took_s": 0} == {
        "scaled": "test",
        "workers": 1,
        "took_s": 0,
    }
    assert {ask()["slot"] for _ in range(10)} == {0}
    eventually(lambda: slots(running), [0])
    assert pids(running) < two
    assert running.status()["generation"] == 1
    # To what is there already: nothing to do.
    assert running.ask("scale", workers=1)["workers"] == 1
    assert slots(running) == [0]


@pytest.mark.parametrize(
    "workers, words",
    [
        ("0", "scale test to 0: a number from 1 to 1024 is wanted; see `steer stop`\n"),
        ("129", "run 129 workers in test: it was started with capacity for 128; stop it, "
                "and start it with 129 workers\n"),
    ],
)  # fmt: skip
def test_scale_to_what_makes_no_sense(service: StartService, workers: str, words: str) -> None:
    running = service("-w", "1")
    before = running.workers()
    done = running.steer("scale", "test", workers)
    assert (done.returncode, done.stderr) == (1, f"steer: {words}")
    assert is_as_before(running, before)


def test_scale_wants_a_number(service: StartService) -> None:
    running = service("-w", "2")
    for workers in (-1, 0, 1025, 10**30, 1.5, "2", None, True, [2]):
        assert "a number from 1 to 1024" in refusal(running, "scale", workers=workers)
    assert running.steer("scale", "test", "+0").returncode == 2
    assert slots(running, "ready") == [0, 1]


def test_scale_whose_workers_do_not_come_up_changes_nothing(
    service: StartService, home: Path
) -> None:
    running = service("app:serve", "-w", "1")
    before = running.workers()
    (home / "app.py").write_text(BROKEN)
    done = running.steer("scale", "3")
    assert done.returncode == 4
    eventually(lambda: is_as_before(running, before))
    (home / "app.py").write_text(APP)
    running.ask("scale", workers=2, timeout_s=None)
    assert len(pids(running, "ready")) == 2


def test_last_that_serves_is_not_scaled_away(service: StartService) -> None:
    running = service("-w", "2", "--policy", "hash")
    running.ask("drain", slot=0)
    with Clients(2) as clients:
        clients.get(10)
        running.ask("scale", workers=1, timeout_s=None)
        clients.get(10)
    assert clients.failures == []
    assert slots(running, "ready") == [2]


def test_more_workers_may_open_more_files(service: StartService) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (220, hard))
    try:
        running = service("-w", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert limit(running.pid) == 220
    running.ask("scale", workers=4, timeout_s=None)
    assert limit(running.pid) > 220
    assert limit(running.workers()[-1]["pid"]) == 220


def limit(pid: int) -> int:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(int(line.split()[3]) for line in lines if line.startswith("Max open files"))


# One worker


@pytest.mark.needs("bpf")
def test_drained_worker_gets_nothing_and_finishes(service: StartService, home: Path) -> None:
    running = service("app:serve", "-w", "2", "--policy", "round-robin")
    with held(home) as sock:
        (busy,) = (slot for slot, number in running.selected().items() if number)
        done = running.steer("drain", str(busy))
        assert done.stdout == f"drained test: slot {busy}\n"
        assert slots(running, "draining") == [busy]
        assert {ask()["slot"] for _ in range(10)} == {1 - busy}
        (home / "go").touch()
        with sock.makefile("rb") as answer:
            assert json.loads(answer.read().partition(b"\r\n\r\n")[2])["slot"] == busy
    assert slots(running, "draining") == [busy]
    assert running.selected()[busy] == 1

    done = running.steer("undrain", "test", str(busy), "--json")
    assert json.loads(done.stdout) == {"undrained": "test", "slot": busy}
    assert {ask()["slot"] for _ in range(10)} == {0, 1}


def test_restart_replaces_one(service: StartService) -> None:
    running = service("-w", "2", "--policy", "round-robin")
    kept, replaced = running.workers()
    with Clients(2) as clients:
        done = running.steer("restart", "1")
        clients.get(20)
    assert done.stdout.startswith("restarted test: slot 2 in place of slot 1, ")
    assert clients.failures == []
    eventually(lambda: gone({replaced["pid"]}))
    eventually(lambda: slots(running), [0, 2])
    assert running.workers()[0]["pid"] == kept["pid"]
    # The last is no exception: the new one serves before it ends.
    running.ask("scale", workers=1, timeout_s=None)
    running.ask("restart", slot=0, timeout_s=None)
    assert ask()["slot"] == slots(running, "ready")[0]


def test_worker_that_is_not_there_or_not_so(service: StartService) -> None:
    running = service("-w", "2")
    running.ask("drain", slot=0)
    for command, slot, words in [
        ("drain", 1, "drain worker 1: no other is ready; start one, or `steer stop`"),
        ("drain", 0, "drain worker 0: it is draining; has to be ready"),
        ("undrain", 1, "undrain worker 1: it is ready; has to be draining"),
        ("drain", 7, "drain worker 7: no such slot; there are: 0, 1"),
        ("undrain", 7, "undrain worker 7: no such slot; there are: 0, 1"),
        ("restart", 7, "restart worker 7: no such slot; there are: 0, 1"),
    ]:
        assert refusal(running, command, slot=slot) == words
    for odd in (None, "0", [0], -1):
        assert "no such slot" in refusal(running, "drain", slot=odd)
    done = running.steer("drain", "test", "1")
    assert (done.returncode, done.stderr[:7]) == (1, "steer: ")
    assert [each["state"] for each in running.workers()] == ["draining", "ready"]


def test_drain_of_one_that_takes_nothing_moves_what_waits(service: StartService) -> None:
    running = service("app:serve", "-w", "2", "--policy", "round-robin", "--hang-timeout", "0")
    stopped, other = running.workers()
    freeze(stopped["pid"])
    try:
        with Clients(2) as clients:
            eventually(lambda: running.selected()[stopped["slot"]])
            running.ask("drain", slot=stopped["slot"], timeout_s=None)
            clients.get(10)
        assert clients.failures == []
        assert clients.pids() == {other["pid"]}
    finally:
        os.kill(stopped["pid"], signal.SIGCONT)


def test_drain_says_if_what_waits_is_not_taken(service: StartService) -> None:
    running = service("app:serve", "-w", "2", "--policy", "random", "--backend", "cbpf",
                      "--graceful-timeout", "0.2", "--hang-timeout", "0")  # fmt: skip
    for worker in running.workers():
        freeze(worker["pid"])
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S):
        (slot,) = eventually(
            lambda: [each["slot"] for each in running.workers() if each["connections"]["queued"]]
        )
        done = running.steer("drain", str(slot))
        for worker in running.workers():
            os.kill(worker["pid"], signal.SIGCONT)
    assert done.returncode == 1
    assert f"drain worker {slot}: it gets nothing new, but has not taken what" in done.stderr
    assert slots(running, "draining") == [slot]


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: activity.is_stopped(pid))


def test_kernels_own_hash_cannot_leave_one_out(service: StartService) -> None:
    running = service("-w", "2", "--policy", "kernel")
    done = running.steer("drain", "0")
    assert done.returncode == 1
    assert done.stderr == (
        "steer: drain worker 0: the kernel's own hash selects every worker; "
        "use ebpf or cbpf, see `steer doctor`\n"
    )
    assert slots(running, "ready") == [0, 1]


# Signals


def test_hangup_reloads(service: StartService) -> None:
    running = service("-w", "1")
    reload_by_hangup(running)
    assert ask()["generation"] == 2


def test_hangup_that_fails_is_logged(service: StartService, home: Path) -> None:
    running = service("app:exits", "-w", "1")
    before = running.workers()
    running.send_signal(signal.SIGHUP)
    eventually(lambda: f"start workers: exit status 7; {UNCHANGED}" in running.log)
    assert "[ERROR]   | out of order" in running.log
    eventually(lambda: is_as_before(running, before))


def test_one_worker_more_or_less(service: StartService) -> None:
    running = service("-w", "1")
    running.send_signal(signal.SIGTTIN)
    eventually(lambda: slots(running, "ready"), [0, 1])
    running.send_signal(signal.SIGTTOU)
    eventually(lambda: slots(running), [0])
    running.send_signal(signal.SIGTTOU)
    refusal = "by -1: 1 worker there, and there may be 1 to 1024; see `steer stop`"
    eventually(lambda: refusal in running.log)
    assert running.steer("scale", "+2").returncode == 0
    assert slots(running, "ready") == [0, 2, 3]
    assert running.steer("scale", "-1").returncode == 0
    eventually(lambda: slots(running), [0, 2])
    done = running.steer("scale", running.name, "-2")
    assert done.returncode == 1
    assert refusal.replace("-1: 1 worker", "-2: 2 workers") in done.stderr
    assert slots(running, "ready") == [0, 2]


def test_each_signal_counts(service: StartService, home: Path) -> None:
    """Also one that comes while another is carried out."""
    running = service("app:slow", "-w", "1")
    with asking(running, "reload") as reload:
        eventually(lambda: slots(running, "starting"), [1])
        running.send_signal(signal.SIGTTIN)
        running.status()
        running.send_signal(signal.SIGTTIN)
        running.status()
        for slot in (1, 2, 3):
            (home / f"go-{slot}").touch()
        reload.result(DEADLINE_S)
    eventually(lambda: slots(running, "ready"), [1, 2, 3])


@pytest.mark.needs("bpf", "migrate")
def test_window_change_ends_all_workers_until_hangup(service: StartService, home: Path) -> None:
    running = service("app:serve", "-w", "2")
    with held(home):
        running.send_signal(signal.SIGWINCH)
        eventually(lambda: len(slots(running, "stopping")), 1)
        (home / "go").touch()
    eventually(lambda: slots(running), [])
    assert running.status()["state"] == "running"
    # Who comes meanwhile waits.
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask) for _ in range(2)]
        reload_by_hangup(running)
        assert {each.result(DEADLINE_S)["generation"] for each in waiting} == {2}
    assert len(slots(running, "ready")) == 2


@pytest.mark.parametrize("backend", ["cbpf", "kernel"])
def test_without_workers_who_comes_is_refused(service: StartService, backend: str) -> None:
    """Where there are no backup listeners."""
    policy = "kernel" if backend == "kernel" else "hash"
    running = service("-w", "2", "--policy", policy, "--backend", backend)
    running.send_signal(signal.SIGWINCH)
    eventually(lambda: slots(running), [])
    with pytest.raises(ConnectionRefusedError):
        ask()
    running.send_signal(signal.SIGTTIN)
    running.wait_ready(1)
    assert ask()["slot"] == slots(running)[0]


def test_log_is_opened_anew(service: StartService) -> None:
    running = service("app:serve", "-w", "1")
    (worker,) = pids(running)
    (guard,) = {*processes.descendants(running.pid)} - {running.pid, worker}
    file = running.records / "stderr"
    file.rename(file.with_suffix(".1"))
    running.send_signal(signal.SIGUSR1)
    eventually(file.exists)

    reload_by_hangup(running)

    eventually(lambda: "generation 2 serves" in running.log)
    eventually(lambda: "worker 1 starts serve" in running.log)
    assert "worker 0 starts" not in running.log
    assert "generation 2" not in file.with_suffix(".1").read_text()
    for pid in (running.pid, guard):
        eventually(lambda pid=pid: descriptors(pid)[2], str(file))
    # Standard output was another file, and still is.
    assert "worker 1 says serve" in running.output


# Several at once, and ends in the middle


def test_two_reloads_are_carried_out_one_after_the_other(service: StartService) -> None:
    running = service("-w", "2")
    with Clients(2) as clients, asking(running, "reload") as one, asking(running, "reload") as two:
        done = [each.result(DEADLINE_S)["generation"] for each in (one, two)]
        clients.get(10)
    assert clients.failures == []
    assert sorted(done) == [2, 3]
    assert running.status()["generation"] == 3
    eventually(lambda: len(slots(running)), 2)


def test_scale_goes_from_what_a_reload_before_it_has_left(
    service: StartService, home: Path
) -> None:
    configure(home, env=["A=1"])
    running = service("app:slow", "-w", "1", "--policy", "hash")
    configure(home, env=["A=2"])
    with asking(running, "reload") as reload:
        eventually(lambda: slots(running, "starting"), [1])
        with asking(running, "scale", workers=2) as scale:
            for slot in (1, 2):
                (home / f"go-{slot}").touch()
            reload.result(DEADLINE_S)
            scale.result(DEADLINE_S)
    eventually(lambda: slots(running), [1, 2])
    assert {(ask()["A"], ask()["slot"]) for _ in range(40)} >= {("2", 1), ("2", 2)}
    assert "1" not in {ask()["A"] for _ in range(20)}


def test_restart_of_one_that_a_reload_has_ended(service: StartService, home: Path) -> None:
    running = service("app:slow", "-w", "1")
    with asking(running, "reload") as reload:
        eventually(lambda: slots(running, "starting"), [1])
        with asking(running, "restart", slot=0) as restart:
            (home / "go-1").touch()
            reload.result(DEADLINE_S)
            with pytest.raises(Refused, match=r"restart worker 0: (it is stopping|no such slot)"):
                restart.result(DEADLINE_S)
    eventually(lambda: slots(running), [1])


@pytest.mark.parametrize("quick", [False, True])
def test_stop_during_a_reload(service: StartService, home: Path, quick: bool) -> None:
    running = service("app:slow", "-w", "2")
    with asking(running, "reload") as reload, asking(running, "reload") as second:
        eventually(lambda: 2 in slots(running, "starting"))
        running.ask("stop", quick=quick, timeout_s=None)
        for each in (reload, second):
            with pytest.raises(Refused, match=r"^reload test: the service is ending$"):
                each.result(DEADLINE_S)
    assert running.wait() == 0
    assert "bug" not in running.log
    running.leaves_nothing()


def test_reload_goes_on_when_its_asker_has_gone(service: StartService, home: Path) -> None:
    running = service("app:slow", "-w", "1")
    with peer.connect(running.control_socket, DEADLINE_S) as sock:
        sock.sendall(b'{"command": "reload", "progress": true}\n')
        assert json.loads(sock.recv(1000)) == {"progress": "ready", "done": 0, "of": 1}
    (home / "go-1").touch()
    eventually(lambda: running.status()["generation"], 2)
    assert ask()["generation"] == 2
    assert "bug" not in running.log


def test_supervisor_is_told(service: StartService, home: Path, environment: dict[str, str]) -> None:
    path = str(home / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(DEADLINE_S)
        environment["NOTIFY_SOCKET"] = path
        running = service("app:exits", "-w", "1")
        assert sock.recv(1000) == f"READY=1\nMAINPID={running.pid}".encode()
        before_us = time.monotonic_ns() // 1000
        with pytest.raises(Refused):
            running.ask("reload", timeout_s=None)
        first, second = sock.recv(1000).split(b"\n")
        assert first == b"RELOADING=1"
        assert before_us <= int(second.removeprefix(b"MONOTONIC_USEC="))
        assert sock.recv(1000) == b"READY=1"
        running.stop()
        assert sock.recv(1000) == b"STOPPING=1"


# Datagrams


@pytest.mark.needs("bpf")
def test_no_datagram_is_lost(service: StartService) -> None:
    running = service("-w", "2", "--policy", "round-robin", "-b", f"udp://127.0.0.1:{PORT}")
    sent, received = 0, Counter[int]()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", PORT))
        for generation in range(2, 8):
            with asking(running, "reload") as reload:
                while not (reload.done() and received[generation]):
                    client.send(b"x")
                    sent += 1
                    time.sleep(0.001)
                    for answer in at_hand(client):
                        received[json.loads(answer)["generation"]] += 1
        while received.total() < sent:
            received[json.loads(client.recv(1000))["generation"]] += 1
    assert received.total() == sent == running.status()["totals"]["selected"]
    assert set(received) == {1, 2, 3, 4, 5, 6, 7}


def at_hand(client: socket.socket) -> Iterator[bytes]:
    while is_ready(client):
        yield client.recv(1000)


@pytest.mark.needs("bpf")
def test_queue_of_datagrams_is_emptied_before_the_worker_is_told_to_end(
    service: StartService,
) -> None:
    running = service("app:reads_slowly", "-w", "1", "-b", f"udp://127.0.0.1:{PORT}")
    (old,) = pids(running)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", PORT))
        for _ in range(50):
            client.send(b"x")
        running.ask("reload", timeout_s=None)
        client.send(b"y")
        answers = Counter[bytes]()
        for _ in range(51):
            answers[client.recv(10)] += 1
    assert answers == {b"1": 50, b"2": 1}
    eventually(lambda: gone({old}))


# Without a program that migrates


@pytest.mark.parametrize("backend", ["cbpf", "kernel"])
def test_on_other_backends_it_says_what_may_be_lost(
    service: StartService, steer: RunSteer, backend: str
) -> None:
    policy = "kernel" if backend == "kernel" else "hash"
    options = ("-w", "2", "--policy", policy, "--backend", backend)
    bind = ("-b", f"127.0.0.1:{PORT + 1}")
    running = service(*options)
    before = pids(running)
    notes = running.status()["notes"]
    assert any("are lost" in note for note in notes)
    for note in notes:
        assert f"note: {note}" in running.steer("status").stdout.replace("\n  ", " ")

    assert running.ask("reload", timeout_s=None)["generation"] == 2

    eventually(lambda: gone(before))
    assert {ask()["generation"] for _ in range(10)} == {2}
    checked = steer("check", *options, *bind)
    assert [f"note: {note}" for note in notes] == checked.stdout.splitlines()[-len(notes) :]
    assert json.loads(steer("check", *options, *bind, "--json").stdout)["notes"] == notes
    found = json.loads(steer("doctor", *options, "--json").stdout)["findings"]
    told = " ".join(each["found"] for each in found if each["verdict"] == "warn")
    assert "0: connections that wait in a closing worker's queue are reset" in told
    assert (notes[0] in told) == (backend == "kernel")


@pytest.mark.needs("root")
def test_whether_the_kernel_migrates_may_be_hidden(
    service: StartService, environment: dict[str, str], home: Path
) -> None:
    """By a /proc that has no /proc/sys: then it is not said to be too old."""
    mounts = 'mount -t proc -o subset=pid proc /proc && exec "$@"'
    hidden = ("unshare", "--mount", "sh", "-c", mounts, "-")
    done = subprocess.run([*hidden, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a mount of proc with subset=pid (Linux 5.8): {done.stderr}")
    options = ("-w", "1", "--policy", "hash", "--backend", "cbpf")
    words = (
        "connections queued at a worker that crashes or hangs may be lost: steer could not find out"
        " whether the kernel moves them (read /proc/sys/net/ipv4/tcp_migrate_req: ENOENT;"
        " mount /proc without subset=pid)"
    )
    running = service(*options, under=hidden)
    assert running.status()["notes"] == [words]
    done = subprocess.run(
        [*hidden, STEER, "doctor", *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert "ENOENT: connections in a closing worker's queue may be reset" in done.stdout
    assert "5.14" not in running.log + done.stdout


@pytest.mark.needs("bpf", "migrate")
def test_where_nothing_is_lost_nothing_is_noted(service: StartService, steer: RunSteer) -> None:
    assert service("-w", "1").status()["notes"] == []
    assert "note" not in steer("check", "-b", f"127.0.0.1:{PORT + 1}").stdout
    checked = steer("check", "-b", f"127.0.0.1:{PORT + 1}", "--json")
    assert json.loads(checked.stdout)["notes"] == []
