"""Servers from PyPI, as commands and served by steer: each of several under its own socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from steer.linux import processes
from testkit.clients import http_get
from testkit.fixtures import StartService
from testkit.harness import CPUS, pinned
from testkit.processes import DEADLINE_S, eventually, is_running
from testkit.programs import source

PORT = 8080
COMMANDS = {
    "uvicorn": ("uvicorn", "asgi:app", "--fd", "{fd}"),
    "gunicorn": ("gunicorn", "-w", "1", "wsgi:app"),
    "hypercorn": ("hypercorn", "asgi:app", "--bind", "fd://{fd}", "--graceful-timeout", "60"),
}
SERVED = {
    "--server uvicorn": "asgi:app",
    "--server hypercorn": "asgi:app",
    "--server waitress": "wsgi:app",
}
SAYS_WHEN_STOPPED = {"uvicorn": "Shutting down", "gunicorn": "Handling signal: term"}
STOPS = "stopping gracefully"  # what steer says: the others say nothing
ASGI = source("asgi")
WSGI = source("wsgi")


def servers(*names: str) -> pytest.MarkDecorator:
    """Runs a test with each of these, as far as they are installed."""
    needed = {name: pytest.mark.needs("bpf", name.split()[-1]) for name in names}
    values = [pytest.param(name, marks=mark) for name, mark in needed.items()]
    return pytest.mark.parametrize("server", values)


every_command = servers(*COMMANDS)
every_server = servers(*COMMANDS, *SERVED)


@pytest.fixture(autouse=True)
def applications(home: Path) -> None:
    (home / "asgi.py").write_text(ASGI)
    (home / "wsgi.py").write_text(WSGI)


def command(server: str) -> tuple[str, ...]:
    """The arguments that run it."""
    if server in SERVED:
        return ("--policy", "round-robin", *server.split(), SERVED[server])
    return ("--policy", "round-robin", "--", sys.executable, "-m", *COMMANDS[server])


def slots(times: int) -> list[int]:
    """Who answers, one connection after the other, all taken in by one CPU."""
    with pinned(CPUS[0]):
        return [http_get("127.0.0.1", PORT)[1]["slot"] for _ in range(times)]


def request(sock: socket.socket, target: str = "/") -> None:
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


def answer(sock: socket.socket) -> dict[str, int]:
    with sock.makefile("rb") as stream:
        assert b" 200 " in stream.readline()
        fields = dict(line.lower().split(b": ") for line in iter(stream.readline, b"\r\n"))
        found: dict[str, int] = json.loads(stream.read(int(fields[b"content-length"])))
        return found


@every_server
def test_takes_turns_and_ends_gracefully(service: StartService, home: Path, server: str) -> None:
    running = service("-w", "3", *command(server))

    seen = slots(12)
    assert sorted(seen[:3]) == [0, 1, 2]
    assert seen == seen[:3] * 4

    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as held:
        request(held, "/held")
        eventually((home / "under-way").exists)
        running.send_signal(signal.SIGTERM)
        said = next((say for name, say in SAYS_WHEN_STOPPED.items() if name in server), STOPS)
        eventually(lambda: said in running.log)
        assert running.process.poll() is None
        (home / "go").touch()
        assert answer(held)["slot"] in (0, 1, 2)
    assert running.wait() == 0


@servers("uvicorn", "hypercorn", *SERVED)
def test_keeps_a_connection_with_its_worker(service: StartService, server: str) -> None:
    service("-w", "2", *command(server))
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        answers = []
        for _ in range(3):
            request(sock)
            answers.append(answer(sock))
    assert answers == answers[:1] * 3


@every_server
def test_gets_nothing_before_its_application_has_started(
    service: StartService, home: Path, environment: dict[str, str], server: str
) -> None:
    environment["HOLD"] = "1"
    (home / "start-1").touch()
    running = service("-w", "2", *command(server), ready=False).wait_ready(1)

    assert slots(6) == [1] * 6
    assert [each["state"] for each in running.workers()] == ["starting", "ready"]

    (home / "start-0").touch()
    running.wait_ready(2)
    assert sorted(slots(2)) == [0, 1]


@every_command
def test_that_cannot_load_its_application_ends_with_its_own_words(
    service: StartService, home: Path, server: str
) -> None:
    for name in ("asgi.py", "wsgi.py"):
        (home / name).write_text("import no_such_module\n")
    running = service("-w", "2", *command(server), ready=False)
    assert running.wait() == 3
    assert "steer: start workers: exit status" in running.log
    assert "  | ModuleNotFoundError: No module named 'no_such_module'" in running.log


@pytest.mark.needs("gunicorn")
def test_gunicorns_own_workers_do_not_outlive_it(service: StartService) -> None:
    running = service("-w", "1", *command("gunicorn"))
    (before,) = running.workers()
    arbiter, child = processes.descendants(before["pid"])

    os.kill(arbiter, signal.SIGKILL)

    eventually(lambda: not is_running(child))
    running.wait_ready()
    (after,) = running.workers()
    assert after["pid"] != before["pid"]
    assert after["restarts"] == 1
    assert http_get("127.0.0.1", PORT)[1]["slot"] == after["slot"] != before["slot"]
