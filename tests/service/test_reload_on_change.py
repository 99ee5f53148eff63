"""`--reload-on-change`: new code serves as soon as it can be imported."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from testkit.fixtures import RunSteer, StartService
from testkit.processes import DEADLINE_S, eventually
from testkit.service import Service

PORT = 8080
APP = """
from words import WORD


def serve(worker):
    worker.ready()
    while True:
        try:
            connection, _ = worker.sockets[0].accept()
        except BlockingIOError:
            return
        with connection:
            connection.sendall(WORD)
"""


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)
    say(home, "first")


def say(home: Path, word: str) -> None:
    (home / "words.py").write_text(f"WORD = {word.encode()!r}\n")


def answer() -> str:
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        return sock.makefile().read()


@pytest.fixture
def running(service: StartService) -> Service:
    started = service("app:serve", "-w", "2", "--policy", "hash", "--reload-on-change")
    eventually(lambda: "watching the Python files" in started.log)
    return started


def test_new_code_serves(running: Service, home: Path) -> None:
    assert answer() == "first"
    say(home, "second")
    eventually(answer, "second")
    assert "words.py changed; reloading" in running.log


def test_code_that_cannot_be_imported_leaves_the_old_workers(running: Service, home: Path) -> None:
    (home / "words.py").write_text("WORD = missing\n")
    eventually(lambda: "name 'missing' is not defined" in running.log)
    assert answer() == "first"
    (home / "words.py").write_text("\n\nWORD = missing\n")
    eventually(lambda: running.log.count("changed; reloading"), 2)
    (home / "words.py").write_text("\n\nWORD = missing  # still\n")
    eventually(lambda: running.log.count("changed; reloading"), 3)
    say(home, "mended")
    eventually(answer, "mended")


def test_same_error_is_told_once(running: Service, home: Path) -> None:
    (home / "words.py").write_text("WORD = missing\n")
    eventually(lambda: running.log.count("cannot reload"), 1)
    (home / "words.py").write_text("WORD = missing\n\n")
    eventually(lambda: running.log.count("cannot reload"), 2)
    assert running.log.count("name 'missing' is not defined") == 1
    assert "cannot reload: as before" in running.log


def test_other_files_change_nothing(running: Service, home: Path) -> None:
    (home / "data.txt").write_text("new")
    say(home, "second")
    eventually(answer, "second")
    assert "data.txt" not in running.log


def test_it_stops_with_the_service(running: Service) -> None:
    assert running.stop() == 0


def test_a_reload_may_switch_it_off(service: StartService, home: Path) -> None:
    file = home / "steer.toml"
    text = '[service]\napp = "app:serve"\nworkers = 1\npolicy = "hash"\n'
    file.write_text(f"{text}reload_on_change = true\n")
    running = service("--config", str(file))
    eventually(lambda: "watching the Python files" in running.log)
    file.write_text(text)
    running.ask("reload")
    say(home, "second")
    running.ask("reload")
    assert answer() == "second"
    assert "changed; reloading" not in running.log


def test_without_watchfiles(steer: RunSteer, home: Path, environment: dict[str, str]) -> None:
    (home / "watchfiles.py").write_text("raise ImportError('No module named watchfiles')\n")
    environment["PYTHONPATH"] = str(home)
    found = steer("run", "app:serve", "--reload-on-change")
    assert found.returncode == 1
    assert found.stderr == (
        "steer: reload_on_change: it needs watchfiles: No module named watchfiles;"
        " pip install 'steer-reuseport[reload]'\n"
    )
