"""Controller and guard both killed with -9: nobody is left to adopt the workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from steer.control import find, record
from steer.linux import processes
from testkit.clients import answer, is_port_free, request
from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.processes import DEADLINE_S, eventually, is_running
from testkit.programs import source
from testkit.service import STEER, Service, clean_environment, lose_directory

pytestmark = pytest.mark.needs("netns")
BIND = ("-b", f"127.0.0.1:{PORT}")
SERVER = source("server_that_stays")
""""closes": all descriptors that it does not know. "lingers": until there is a file `go`."""


def kill_both(running: Service, directory: bool = True) -> list[int]:
    """The workers that are left. Args: directory: whether the run directory stays."""
    workers = [each["pid"] for each in running.workers()]
    (guard,) = set(processes.children(running.pid)) - set(workers)
    for pid in (running.pid, guard):  # not to be noticed by the other
        os.kill(pid, signal.SIGSTOP)
    if not directory:
        lose_directory(running)
    for pid in (guard, running.pid):
        os.kill(pid, signal.SIGKILL)
    running.wait()
    return workers


@pytest.fixture(autouse=True)
def server(home: Path) -> None:
    (home / "server.py").write_text(SERVER)


def command(*arguments: str) -> tuple[str, ...]:
    return ("--", sys.executable, "server.py", *arguments)


def told(home: Path, pid: int) -> list[int]:
    """The signals that a server got."""
    path = home / f"told-{pid}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def hearing(home: Path) -> list[int]:
    """The servers that would note a signal by now."""
    return [int(path.name.removeprefix("hears-")) for path in home.glob("hears-*")]


# They are told by the kernel


@pytest.mark.parametrize(
    "how, number",
    [
        pytest.param((), 15, id="demo"),
        pytest.param(command(), 15, id="command"),
        pytest.param(("--stop-signal", "USR1", *command()), 10, id="stop-signal"),
        pytest.param(("--", "sh", "-c", f"exec {sys.executable} server.py"), 15, id="shell"),
        pytest.param(
            ("-u", "nobody", "--", "/usr/bin/python3", "server.py"),
            15,
            id="another-user",
            marks=pytest.mark.needs("root"),
        ),
    ],
)
def test_they_finish_what_they_have_and_the_port_is_free(
    service: StartService, home: Path, how: tuple[str, ...], number: int
) -> None:
    running = service(*BIND, "-w", "2", *how)
    under_way = [request("/wait?sleep_ms=1500") for _ in range(2)]
    eventually(lambda: sum(running.selected().values()), 2)
    workers = kill_both(running)
    if how:
        served = {pid for pid in workers if eventually(lambda pid=pid: told(home, pid))}
        assert served == set(workers)
    (home / "go").touch()
    assert {answer(each)["pid"] for each in under_way} <= set(workers)
    eventually(lambda: not any(map(is_running, workers)))
    if how:
        assert [told(home, pid) for pid in workers] == [[number]] * 2
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", PORT))


KILLED_EARLY = """
import os, signal, sys
from steer import __main__
from steer.guard.client import GuardClient

GuardClient.start = lambda _: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["steer", *{arguments!r}]
__main__.main()
"""


@pytest.mark.parametrize("how", [(), command()], ids=["demo", "command"])
def test_no_worker_is_left_of_a_start_that_is_killed_before_there_is_a_guard(
    home: Path, netns: object, how: tuple[str, ...]
) -> None:
    start = KILLED_EARLY.format(arguments=["run", *BIND, "-w", "2", "--name", "test", *how])
    done = subprocess.run([sys.executable, "-c", start], env=clean_environment(home), cwd=home)
    assert done.returncode == -signal.SIGKILL
    lines = (home / "run" / "steer" / "test.sock.workers").read_text().splitlines()
    workers = [int(line.split()[0]) for line in lines]
    assert len(workers) == 2
    eventually(lambda: not any(map(is_running, workers)))


def test_each_is_told_once_also_when_another_ends(service: StartService, home: Path) -> None:
    """Some servers that are asked again drop what they have."""
    running = service(*BIND, "-w", "3", *command("lingers"))
    workers = kill_both(running)
    eventually(lambda: all(told(home, pid) for pid in workers))
    os.kill(workers[0], signal.SIGKILL)
    eventually(lambda: not is_running(workers[0]))
    (home / "go").touch()
    eventually(lambda: not any(map(is_running, workers)))
    assert [told(home, pid) for pid in workers] == [[15]] * 3


def test_nothing_else_tells_them(service: StartService, home: Path) -> None:
    """Execution anew, adoption, a guard that is killed, the control socket made again, a reload
    of others, and a change of the policy."""
    running = service(*BIND, "-w", "2", *command())
    workers = [each["pid"] for each in running.workers()]
    running.send_signal(signal.SIGUSR2)
    eventually(lambda: "adopted 2 workers" in running.log)
    running.wait_ready()
    for _ in range(2):
        (guard,) = set(processes.children(running.pid)) - set(workers)
        os.kill(guard, signal.SIGKILL)
        eventually(lambda guard=guard: not is_running(guard))
        eventually(lambda: len(set(processes.children(running.pid)) - set(workers)), 1)
        running.status()  # answered once the new guard has been told everything
    lose_directory(running)
    eventually(lambda: "was removed; now it is" in running.log)
    assert running.steer("policy", "test", "random").returncode == 0
    assert running.log.count("the guard process was killed") <= 2
    running.send_signal(signal.SIGKILL)
    running.wait()
    running = service(*BIND, "-w", "2", *command())
    assert "adopted 2 workers" in running.log
    assert [each["pid"] for each in running.workers()] == workers
    assert [told(home, pid) for pid in workers] == [[], []]
    assert running.stop() == 0
    assert [told(home, pid) for pid in workers] == [[15], [15]]


def test_the_guard_tells_them_once(service: StartService, home: Path) -> None:
    """It lets go of all that it holds before it tells them."""
    running = service(*BIND, "-w", "2", "--adopt-timeout=0", *command("lingers"))
    workers = [each["pid"] for each in running.workers()]
    running.send_signal(signal.SIGKILL)
    running.wait()
    eventually(lambda: all(told(home, pid) for pid in workers))
    (home / "go").touch()
    eventually(lambda: not any(map(is_running, workers)))
    assert [told(home, pid) for pid in workers] == [[15], [15]]


# Those that are not


def test_stop_finds_and_ends_the_workers_and_status_tells_of_them(
    service: StartService,
) -> None:
    running = service(*BIND, "-w", "2", *command("closes"))
    workers = kill_both(running)
    assert answer(request())["pid"] in workers

    told = json.loads(running.steer("status", "--json").stdout)
    assert [each["name"] for each in told["orphaned"]] == ["test"]
    named = ", ".join(map(str, workers))
    assert f"2 workers (pids {named}) go on" in told["orphaned"][0]["state"]
    one = running.steer("status", "test")
    assert (one.returncode, "controller and guard were killed" in one.stderr) == (1, True)

    stopped = running.steer("stop", "test")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped test\n"), stopped.stderr
    assert not any(map(is_running, workers))
    assert not record.living(running.control_socket)
    assert not running.control_socket.parent.exists()


def test_a_new_start_ends_them_and_has_the_port(service: StartService) -> None:
    workers = kill_both(service(*BIND, "-w", "2", *command("closes")))
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


STUBBORN = """
import signal
def serve(worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        worker.sockets[0].accept()[0].close()
"""
LEFT = {
    "command": command("closes"),
    "callable": ("app:serve",),
    "shell": ("--", "sh", "-c", f"{sys.executable} server.py; true"),
    "setsid": ("--", "setsid", "-w", *command()[1:]),
}
"""Those that go on, as they are not told or do not listen."""


@pytest.fixture
def stubborn(home: Path) -> None:
    (home / "app.py").write_text(STUBBORN)


@pytest.mark.needs("setsid")
@pytest.mark.parametrize("directory", [True, False], ids=["record", "no-record"])
@pytest.mark.parametrize("what", LEFT)
def test_they_are_found_without_a_record(
    service: StartService, stubborn: None, what: str, directory: bool
) -> None:
    """And where the first process of a worker has ended, which the record tells of."""
    running = service(*BIND, "-w", "2", *LEFT[what])
    kill_both(running, directory)
    assert not is_port_free()
    told = json.loads(running.steer("status", "--json").stdout)
    assert [each["name"] for each in told["orphaned"]] == ["test"]
    quick = ("--quick",) if what == "callable" else ()
    stopped = running.steer("stop", "test", *quick)
    assert (stopped.returncode, stopped.stdout) == (0, "stopped test\n"), stopped.stderr
    assert is_port_free()
    assert json.loads(running.steer("status", "--json").stdout)["orphaned"] == []
    assert not running.control_socket.parent.exists()


APPS = """
async def asgi(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})
def wsgi(environ, start):
    start("200 OK", [])
    return [b"served"]
"""
REAL = {
    "uvicorn": f"{sys.executable} -m uvicorn apps:asgi --fd 3",
    "gunicorn": f"{sys.executable} -m gunicorn --bind fd://3 apps:wsgi",
}


@pytest.mark.needs("gunicorn", "setsid", "uvicorn")
@pytest.mark.parametrize("wrapper", ["shell", "setsid"])
@pytest.mark.parametrize("server", REAL)
def test_real_servers_below_a_wrapper_are_ended(
    service: StartService, home: Path, server: str, wrapper: str
) -> None:
    (home / "apps.py").write_text(APPS)
    line = REAL[server]
    how = ("sh", "-c", f"{line}; true") if wrapper == "shell" else ("setsid", "-w", *line.split())
    running = service(*BIND, "-w", "2", "--", *how)
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=DEADLINE_S) as response:
        assert response.read() == b"served"
    workers = kill_both(running)
    eventually(lambda: not any(map(is_running, workers)))
    assert not is_port_free()
    (left,) = json.loads(running.steer("status", "--json").stdout)["orphaned"]
    assert "2 workers (pids " in left["state"]  # and not the processes that gunicorn forks, too
    assert running.steer("stop", "test").returncode == 0
    assert is_port_free()


def test_a_new_start_kills_what_does_not_end_in_time(service: StartService, stubborn: None) -> None:
    workers = kill_both(service(*BIND, "-w", "2", "app:serve"), directory=False)
    again = service(*BIND, "-w", "2", "--graceful-timeout", "0.5", "app:serve")
    assert "ending 2 workers whose controller and guard were killed" in again.log
    assert not any(map(is_running, workers))


def test_what_a_wrapper_left_finishes_what_it_has(service: StartService, home: Path) -> None:
    """Each at once, while the other waits."""
    running = service(*BIND, "-w", "2", "--policy", "round-robin", *LEFT["shell"])
    waiting = [request("/wait") for _ in range(2)]
    eventually(lambda: list(running.selected().values()), [1, 1])
    eventually(lambda: len(hearing(home)), 2)
    kill_both(running)
    stopping = subprocess.Popen((STEER, "stop", "test"), env=running.environment)
    eventually(lambda: len(list(home.glob("told-*"))), 2)
    assert stopping.poll() is None
    (home / "go").touch()
    assert {answer(each)["pid"] for each in waiting} == set(hearing(home))
    assert stopping.wait(DEADLINE_S) == 0
    assert [path.read_text() for path in home.glob("told-*")] == ["15\n"] * 2


@pytest.mark.parametrize("directory", [True, False], ids=["record", "no-record"])
def test_a_server_below_three_wrappers_is_told_once_by_stop(
    service: StartService, home: Path, directory: bool
) -> None:
    """The kernel ends the outermost, and each of the others is what is left of that worker."""
    (home / "inner").write_text(f"{sys.executable} server.py; true\n")
    (home / "middle").write_text("sh inner; true\n")
    running = service(*BIND, "-w", "2", "--", "sh", "-c", "sh middle; true")
    waiting = request("/wait")
    eventually(lambda: sum(running.selected().values()), 1)
    eventually(lambda: len(hearing(home)), 2)
    workers = kill_both(running, directory)
    eventually(lambda: not any(map(is_running, workers)))
    (left,) = json.loads(running.steer("status", "--json").stdout)["orphaned"]
    assert "2 workers (pids " in left["state"]
    stopping = subprocess.Popen((STEER, "stop", "test"), env=running.environment)
    eventually(lambda: len(list(home.glob("told-*"))), 2)
    assert stopping.poll() is None
    (home / "go").touch()
    assert answer(waiting)["pid"]
    assert stopping.wait(DEADLINE_S) == 0
    assert [path.read_text() for path in home.glob("told-*")] == ["15\n"] * 2
    assert is_port_free()


@pytest.mark.needs("root")
@pytest.mark.parametrize("directory", [True, False], ids=["record", "no-record"])
def test_a_server_that_changed_its_user_is_found(
    service: StartService, home: Path, directory: bool
) -> None:
    """Below a wrapper that has ended, and it does not end when it is told to."""
    (home / "drops.py").write_text(
        "import os, pathlib, signal, socket\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(f'hears-{os.getpid()}').touch()\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "listener = socket.socket(fileno=3)\n"
        "while True: listener.accept()[0].close()\n"
    )
    wrapped = f"{sys.executable} drops.py; true"
    running = service(*BIND, "-w", "2", "--", "sh", "-c", wrapped)
    eventually(lambda: [os.stat(f"/proc/{pid}").st_uid for pid in hearing(home)], [65534] * 2)
    kill_both(running, directory)
    (left,) = json.loads(running.steer("status", "--json").stdout)["orphaned"]
    assert left["name"] == "test"
    assert running.steer("stop", "test", "--quick").returncode == 0
    assert is_port_free()


def test_one_that_forgot_whose_it_is_is_named_at_the_port(
    service: StartService, home: Path
) -> None:
    """Below a wrapper that has ended, and without the environment that steer gave it."""
    forgets = f"env -i {sys.executable} server.py; true"
    running = service(*BIND, "-w", "1", "--", "sh", "-c", forgets)
    (server,) = eventually(lambda: hearing(home))
    (first,) = kill_both(running)
    eventually(lambda: not is_running(first))
    assert is_running(server)
    again = service(*BIND, "-w", "1", ready=False)
    assert again.wait() == 1
    assert f"(pid {server})" in again.log
    os.kill(server, signal.SIGTERM)
    eventually(is_port_free)


@pytest.mark.needs("setsid")
@pytest.mark.parametrize("what", ["command", "shell", "setsid"])
def test_a_new_start_finds_them_without_a_record(service: StartService, what: str) -> None:
    workers = kill_both(service(*BIND, "-w", "2", *LEFT[what]), directory=False)
    again = service(*BIND, "-w", "2")
    assert "ending 2 workers whose controller and guard were killed" in again.log
    assert not any(map(is_running, workers))


def test_another_service_is_told_who_has_the_port(service: StartService) -> None:
    first = service(*BIND, "-w", "2", *command("closes"), name="first")
    living = service(*BIND, "-w", "1", name="second", ready=False)
    assert living.wait() == 1
    words = "of service 'first'; `steer stop first`, or choose another port"
    assert words in living.log
    workers = kill_both(first, directory=False)
    other = service(*BIND, "-w", "1", name="second", ready=False)
    assert other.wait() == 1
    assert words in other.log
    assert all(f"(pid {pid})" in other.log for pid in workers)
    assert first.steer("stop", "first").returncode == 0
    service(*BIND, "-w", "1", name="second")


@pytest.mark.parametrize("without", ["controller", "nobody"])
def test_those_of_a_living_service_are_not_left(
    service: StartService, environment: dict[str, str], without: str
) -> None:
    """Whose control socket may be gone, too."""
    running = service(*BIND, "-w", "2", "--adopt-timeout=300", *command("closes"))
    workers = [each["pid"] for each in running.workers()]
    for pid in set(processes.children(running.pid)) - set(workers):
        os.kill(pid, signal.SIGSTOP)
    os.kill(running.pid, signal.SIGSTOP)
    lose_directory(running)
    assert find.abandoned_services(environment) == []
    if without == "controller":
        guard = set(processes.children(running.pid)) - set(workers)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert find.abandoned_services(environment) == []
        for pid in guard:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: running.steer("stop", "test").returncode, 0)
    else:
        for pid in (running.pid, *processes.children(running.pid)):
            os.kill(pid, signal.SIGCONT)


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
    assert record.living(control) == []


def test_a_number_that_is_another_process_by_now_is_no_worker(tmp_path: Path) -> None:
    ticks = processes.start_time_ticks(os.getpid())
    assert ticks is not None
    path = tmp_path / "web.sock.workers"
    path.write_text(f"{os.getpid()} {ticks - 1} 15\n")
    assert record.living(tmp_path / "web.sock") == []
    path.write_text(f"{os.getpid()} {ticks} 15\n")
    assert record.living(tmp_path / "web.sock") == [(os.getpid(), 15)]
