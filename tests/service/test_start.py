"""What there is to do from the first instruction to the first answer, and what there is not."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.cli import ask, main, status
from steer.control import schema
from steer.control.server import Tell
from steer.controller.controller import Controller
from steer.linux import fork
from testkit.fake_service import fake_service
from testkit.fixtures import StartService
from testkit.processes import eventually
from testkit.service import clean_environment

ON_ONE_CPU = ("taskset", "-c", "0")

HEAVY = {
    *("asyncio", "bcc", "click", "dataclasses", "hashlib", "inspect", "logging"),
    *("rich", "ssl", "subprocess", "threading", "traceback", "typing_extensions"),
}

SHOW = """
import sys
from steer import __main__

sys.argv = ["steer", *{arguments!r}]
try:
    __main__.main()
except SystemExit as end:
    assert not end.code, end.code
print(*sorted(sys.modules))
"""


def loaded_by(home: Path, *arguments: str) -> Collection[str]:
    """The modules that a command has imported by its end."""
    code = SHOW.format(arguments=arguments)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=clean_environment(home), cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("what", [["--demo"], ["shop:app"], ["--", "sleep", "1"]])
def test_run_imports_nothing_heavy(home: Path, what: list[str]) -> None:
    """Up to where the controller would start."""
    loaded = loaded_by(home, "run", "--check-config", "-w", "2", "--policy", "cpu", *what)
    assert "steer.controller.controller" in loaded
    assert not HEAVY.intersection(loaded)


AT_PATH = ["--control-socket", "run/steer/web.sock"]


@pytest.mark.parametrize("asked", [["web"], ["web", "--json"], ["--json"], [], AT_PATH])
def test_status_imports_only_what_it_shows(home: Path, asked: list[str]) -> None:
    with fake_service(home / "run" / "steer" / "web.sock", status=tells):
        loaded = loaded_by(home, "status", *asked)
    assert "steer.control.schema" in loaded
    needless = {"ctypes", "steer.config.service", "steer.control.abandoned", "steer.linux.fork"}
    assert not (HEAVY | needless).intersection(loaded)


async def tells(_request: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
    totals = schema.Totals()
    web = schema.Service("web", 1, "running", 1, "cpu", "ebpf", None, 1.0, [], [], totals)
    return {"service": web}


WORDS = ("web", "--json", "--watch", "--quick", "-x", "--", "", "--jso", "a=b", "--json=1")
NUMBERS = ("1", "0", "+2", "-1", "+", "1e3", "99999999", "hash", "./mine.c")
AT = ("--control-socket", "--control-socket=/a", "--control-socket=", "--control-socket=-")
SHARES = ("--weights", "--weights=1,2", "--weights=", "--param", "--param=a=1")


@given(st.lists(st.sampled_from(WORDS + AT), max_size=5))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_status_is_read_without_click_as_with_it(arguments: list[str]) -> None:
    found = status.plain(arguments)
    if found is not None:
        context = main.status.make_context("status", list(arguments))
        assert found == status.Asked(**context.params)


@pytest.mark.parametrize("command", ["reload", "scale", "drain", "restart", "policy", "stop"])
@given(arguments=st.lists(st.sampled_from(WORDS + NUMBERS + AT + SHARES), max_size=5))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_an_act_is_read_without_click_as_with_it(command: str, arguments: list[str]) -> None:
    done: list[object] = []

    def note(*given: object, **how: object) -> None:
        done.append((given, how))

    with patch.multiple(ask, perform=note, stop=note):
        act = ask.plain(command, arguments)
        if act is not None:
            act()
            main.cli([command, *arguments], standalone_mode=False)
            assert done[0] == done[1]


@pytest.mark.parametrize(
    "line",
    [
        *("reload", "reload web --json", "scale 3", "scale web +1", "drain 0", "undrain web 1"),
        *("restart 2", "policy hash", "policy web ./mine.c --weights 1,2", "stop web --quick"),
    ],
)
def test_an_act_imports_no_click(home: Path, line: str) -> None:
    code = SHOW.format(arguments=line.split()).replace("assert not end.code", "assert end.code")
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=clean_environment(home), cwd=home, capture_output=True, text=True
    )
    assert "steer.control.client" in done.stdout.split(), done.stderr
    assert not HEAVY.intersection(done.stdout.split())


def test_help_imports_only_click(home: Path) -> None:
    loaded = loaded_by(home, "--help")
    assert "click" in loaded
    assert not {"ctypes", "logging", "msgspec", "rich", "steer.values"}.intersection(loaded)


@pytest.mark.parametrize("arguments", [["run", "--help"], ["run", "--demo", "--workrs", "2"]])
def test_what_run_cannot_read_click_does(home: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "steer", *arguments]
    done = subprocess.run(command, env=clean_environment(home), capture_output=True, text=True)
    assert (done.stdout or done.stderr).startswith("Usage: ")


SAID = [((2,), {"STATUS": "soon"}), ((3,), {"READY": "1"}), ((2,), {"READY": "1"})]


class Starting:
    """A service that imports its loop; that is over once nothing is done meanwhile.

    Attributes:
        early: what was heard.
        serves: whether its worker does.
        imported: the same when the import was over.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *command: str) -> None:
        self.early: list[object] = []
        self.serves = False
        self.imported: list[bool] = []
        self.plan = SimpleNamespace(service=SimpleNamespace(command=command))
        self.pool = self.listener = self
        self._said = iter(SAID)
        patch.setattr(importlib, "import_module", lambda _: self.imported.append(self.serves))
        patch.setattr(threading, "Thread", self._thread)

    @staticmethod
    def _thread(target: Callable[[], None]) -> object:
        return SimpleNamespace(start=lambda: None, is_alive=lambda: True, join=target)

    def serve_early(self, pid: int) -> bool:
        """One of two is of no worker."""
        self.serves |= pid == 2
        return pid == 2

    def fileno(self) -> int:
        return self._always_readable

    def receive(self) -> Iterable[object]:
        return islice(self._said, 1)

    def run(self) -> None:
        with open(os.devnull) as file:
            self._always_readable = file.fileno()
            Controller.await_loop(cast(Any, self))


def test_first_that_is_ready_serves_whatever_was_said_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the loop is still imported."""
    starting = Starting(monkeypatch)
    starting.run()
    assert starting.imported == [True]
    assert starting.early == SAID


def test_what_is_said_for_commands_is_left_until_there_is_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starting = Starting(monkeypatch, "server")
    starting.run()
    assert starting.imported == [False]
    assert starting.early == []


def test_a_worker_collects_its_garbage() -> None:
    """Though the controller does not while it starts."""
    gc.disable()
    try:
        pid, pidfd = fork.fork(lambda: int(gc.isenabled()))
    finally:
        gc.enable()
    os.close(pidfd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    fork.is_done(pid)


COUNTS = """
import sys
from steer import __main__
from steer.linux import unix

looks, may_listen = [], unix.may_listen
unix.may_listen = lambda *given: looks.append(given) or may_listen(*given)
sys.argv = ["steer", "run", "--demo", "--pid", "/no/such/directory/file"]
try:
    __main__.main()
except SystemExit:
    print(len(looks))
"""


def test_unix_sockets_of_others_are_looked_at_once(home: Path) -> None:
    """There may be thousands, and it takes a microsecond for each."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTS], env=clean_environment(home), capture_output=True, text=True
    )
    assert "write pid file" in done.stderr  # after the name was claimed
    assert done.stdout == "1\n"


STARTS = """
import os, socket, time

def note(what):
    with open(f"{what}-{os.environ['STEER_SLOT']}", "w") as file:
        print(time.monotonic(), file=file)

note("started")
path = os.environ["NOTIFY_SOCKET"].replace("@", chr(0), 1)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
    note("ready")
    sender.sendto(b"READY=1", path)
while True:
    socket.socket(fileno=os.dup(3)).accept()
"""


def test_next_command_starts_when_one_is_ready(service: StartService, home: Path) -> None:
    """On one CPU: else each would be ready only when all are."""
    began_s = time.monotonic()
    running = service("-w", "4", "--", sys.executable, "-c", STARTS, under=ON_ONE_CPU)
    assert [each["slot"] for each in running.status()["workers"]] == [0, 1, 2, 3]

    def at_s(what: str, slot: int) -> float:
        return float((running.home / f"{what}-{slot}").read_text())

    for slot in range(1, 4):
        all_start_s = began_s + 1.0
        assert at_s("started", slot) > min(at_s("ready", slot - 1), all_start_s)


def test_command_that_is_never_ready_does_not_keep_others_from_starting(
    service: StartService,
) -> None:
    command = ("-w", "4", "--ready-timeout", "3600", "--", "sleep", "3600")
    running = service(*command, ready=False, under=ON_ONE_CPU)
    workers = running.wait_asked()["workers"]
    assert [each["state"] for each in workers] == ["starting"] * 4
    eventually(lambda: all(each["pid"] for each in running.status()["workers"]))


def test_service_stops_while_commands_wait_for_their_turn(service: StartService) -> None:
    command = ("-w", "4", "--ready-timeout", "3600", "--", "sleep", "3600")
    running = service(*command, ready=False, under=ON_ONE_CPU)
    running.wait_asked()
    running.process.terminate()
    assert running.process.wait() == 0


def test_commands_that_all_fail_end_the_start(service: StartService) -> None:
    """Also those that had not had their turn."""
    running = service("-w", "4", "--", "false", ready=False, under=ON_ONE_CPU)
    assert running.process.wait() == 3
    assert running.log.count("steer: start workers: exit status 1") == 1
