"""Controller and guard both killed with -9: nobody is left to adopt the workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from clients import answer, request
from conftest import StartService
from crew import PORT
from support import Service, eventually, is_running, lose_directory

from steer.kernel import proc, record

pytestmark = pytest.mark.needs("netns")
BIND = ("-b", f"127.0.0.1:{PORT}")
SERVER = """
import os, pathlib, signal, socket, sys, time
listener = socket.socket(fileno=3)
done = []
def finish(number, _):
    with open(f"told-{os.getpid()}", "a") as file:
        file.write(f"{number}\\n")
    done.append(number)
    listener.setblocking(False)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, finish)
if "closes" in sys.argv:
    os.closerange(4, 256)
while not done:
    try:
        client, _ = listener.accept()
    except BlockingIOError:
        break
    with client:
        asked = client.recv(1000)
        while b"wait" in asked and not os.path.exists("go"):
            time.sleep(0.01)
        body = b'{"pid": %d}' % os.getpid()
        client.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n" + body)
while "lingers" in sys.argv and not os.path.exists("go"):
    time.sleep(0.01)
"""
""""closes": all descriptors that it does not know. "lingers": until there is a file `go`."""


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


@pytest.fixture(autouse=True)
def server(home: Path) -> None:
    (home / "server.py").write_text(SERVER)


def command(*arguments: str) -> tuple[str, ...]:
    return ("--", sys.executable, "server.py", *arguments)


def told(home: Path, pid: int) -> list[int]:
    """The signals that a server got."""
    path = home / f"told-{pid}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


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
        (guard,) = set(proc.children(running.pid)) - set(workers)
        os.kill(guard, signal.SIGKILL)
        eventually(lambda guard=guard: not is_running(guard))
        eventually(lambda: len(set(proc.children(running.pid)) - set(workers)), 1)
        running.status()  # answered once the new guard has been told everything
    lose_directory(running)
    eventually(lambda: "was gone; it is" in running.log)
    assert running.steer("policy", "test", "random").returncode == 0
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
    assert "2 workers go on" in told["orphaned"][0]["state"]
    named = running.steer("status", "test")
    assert (named.returncode, "controller and guard were killed" in named.stderr) == (1, True)

    stopped = running.steer("stop", "test")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped test\n"), stopped.stderr
    assert not any(map(is_running, workers))
    assert not record.left(running.control_socket)
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
