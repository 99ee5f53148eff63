"""However an application leaves Python, its worker ends as it should: once, and with all it has."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path

import pytest

from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually, is_running
from testkit.programs import source
from testkit.service import Service

PORT = 8080
APP = source("ends_its_ways")


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


def ask() -> bytes:
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        sock.sendall(b"?")
        return sock.recv(100)


def ends_cleanly(running: Service) -> None:
    assert running.stop() == 0
    log = running.log
    assert "Traceback" not in log
    assert "bug in steer" not in log
    assert "WARNING" not in log
    assert log.count("stopping gracefully") == 1, "a second controller came back from the fork"


@pytest.mark.parametrize("stream", ["without flush", "None", "raises", "exits", "closed"])
def test_streams_may_be_anything_at_the_end(service: StartService, stream: str) -> None:
    """Of the requests during a reload none is lost, nor does a worker go on as something else."""
    running = service("app:replaces", "-w", "2", "-e", f"STREAM={stream}")
    answers: list[bytes] = []
    enough = threading.Event()

    def load() -> None:
        while not enough.is_set():
            answers.append(ask())

    client = threading.Thread(target=load)
    client.start()
    old = [each["pid"] for each in running.workers()]
    running.ask("reload")
    ready = [each["slot"] for each in running.workers() if each["state"] == "ready"]
    running.ask("restart", slot=ready[0])
    eventually(lambda: not any(map(is_running, old)))
    enough.set()
    client.join()
    assert set(answers) == {b"done"}
    ends_cleanly(running)


@pytest.mark.parametrize("app", ["closes_descriptors", "leaves_nothing_as_it_was"])
def test_surroundings_may_be_anything_at_the_end(service: StartService, app: str) -> None:
    running = service(f"app:{app}", "-w", "1")
    assert ask() == b"done"
    ends_cleanly(running)


def test_socket_closed_under_us_is_no_failure_of_the_handler(service: StartService) -> None:
    ends_cleanly(service("app:closes_its_socket", "-w", "1"))


def test_exception_is_shown_whatever_the_application_did_to_the_streams(
    service: StartService,
) -> None:
    running = service("app:raises_unseen", "-w", "1", ready=False)
    assert running.wait() == 3
    assert "LookupError: what went wrong" in running.log


@pytest.mark.parametrize(
    "code, status", [("huge", "exit status 255"), ("minus", "exit status 255"), ("words", "")]
)
def test_any_value_is_an_exit_status(service: StartService, code: str, status: str) -> None:
    running = service("app:exits", "-w", "1", "-e", f"CODE={code}", ready=False)
    assert running.wait() == 3
    assert (status or "exit status 1") in running.log
    assert code != "words" or "in words" in running.log
    assert running.log.count("Traceback") == 0


def test_what_is_registered_to_be_done_at_the_end_is_done(
    service: StartService, home: Path
) -> None:
    running = service("app:registers", "-w", "1")
    ends_cleanly(running)
    assert (home / "registered").exists()
    assert (home / "registered-by-import").exists()


@pytest.mark.parametrize("app", ["in_threads", "in_a_pool"])
def test_threads_finish_what_they_have(service: StartService, home: Path, app: str) -> None:
    running = service(f"app:{app}", "-w", "1")
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        sock.sendall(b"?")
        eventually((home / "under-way").exists)
        running.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping gracefully" in running.log)
        (home / "go").touch()
        assert sock.recv(100) == b"done"
    assert running.wait() == 0
    assert "WARNING" not in running.log


def test_thread_that_never_ends_keeps_nobody(service: StartService) -> None:
    """Nobody told the worker to end, so nobody would kill it."""
    running = service("app:never_ends", "-w", "1", "--graceful-timeout", "0.3", ready=False)
    assert running.wait() == 3
