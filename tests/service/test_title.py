"""What ps(1) shows: controller, guard and workers tell themselves apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steer.linux import processes
from steer.linux import title as own
from testkit.fixtures import StartService
from testkit.processes import eventually, python
from testkit.programs import source

APP = source("has_a_title")


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()


def titles(controller: int) -> list[str]:
    """Of all but the controller itself."""
    return sorted(title(pid) for pid in processes.descendants(controller) if pid != controller)


def names(controller: int) -> list[str]:
    """As ps(1) without arguments and top(1) have them."""
    return sorted(processes.command(pid) or "" for pid in processes.descendants(controller))


def test_each_process_of_a_service_is_named(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    (home / "app.py").write_text(APP)
    running = service("-w", "2", "app:serve", name="web")
    ours = ["steer: guard web", "steer: worker 0 web", "steer: worker 1 web"]
    assert title(running.pid) == "steer: controller web"
    assert titles(running.pid) == ours
    seen = (home / "seen").read_text()
    assert seen.count(environment["PATH"]) == 2
    assert seen.endswith('"app:serve"]')
    shown = subprocess.run(
        ["ps", "-o", "args=", "-p", str(running.pid)], capture_output=True, text=True
    )
    assert shown.stdout.strip() == "steer: controller web"
    assert names(running.pid) == ["reuseport-guard", "steer", "steer-worker", "steer-worker"]
    # What it was started with is what it executes anew.
    generation = running.status()["generation"]
    running.process.send_signal(signal.SIGUSR2)
    eventually(lambda: "adopted 2 workers" in running.log)
    eventually(lambda: titles(running.pid), ours)
    assert title(running.pid) == "steer: controller web"
    assert processes.command(running.pid) == "steer"
    assert running.status()["generation"] == generation


def test_commands_have_names_of_their_own(service: StartService) -> None:
    code = "import socket, signal; socket.socket(fileno=3).accept()"
    running = service("-w", "1", "--", sys.executable, "-c", code, name="web")
    assert titles(running.pid) == [f"{sys.executable} -c {code}", "steer: guard web"]


@pytest.mark.parametrize("given", ["x", "x" * 4096, "é" * 99])
def test_a_title_stays_within_the_arguments(given: str) -> None:
    """Behind them is the environment: nothing of it is shown or overwritten."""
    code = (
        "import sys, os; from steer.linux import title; before = os.popen('env').read();"
        "title.show(sys.argv[1] * 99 if len(sys.argv[1]) == 1 else sys.argv[1] + 'more');"
        "print(open('/proc/self/cmdline', 'rb').read().rstrip(b'\\0').decode(errors='replace'));"
        "print(os.popen('env').read() == before, open('/proc/self/environ').read()[:5])"
    )
    argv = python(code, given)
    done = subprocess.run(argv, capture_output=True, text=True, env={"PATH": "/bin"})
    shown, *rest = done.stdout.splitlines()
    room = sum(len(each.encode()) + 1 for each in argv)
    assert set(shown) <= {*given, *"more\ufffd"}
    assert len(shown.encode()) <= room
    assert rest == ["True PATH="], done.stderr


@pytest.mark.parametrize("content", ["", "1 (x) S", "1 (x) " + "0 " * 60, "1 (x) " + "z " * 60])
def test_where_the_kernel_does_not_say_nothing_is_changed(tmp_path: Path, content: str) -> None:
    before = title(os.getpid())
    (tmp_path / "stat").write_text(content)
    own.show("x", str(tmp_path / "stat"))
    own.show("x", str(tmp_path / "nothing"))
    assert title(os.getpid()) == before
