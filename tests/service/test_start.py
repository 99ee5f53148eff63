"""What there is to do from the first instruction to the first answer, and what there is not."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from steer.control import schema
from steer.control.server import Progress
from steer.linux import fork
from testkit.fake_service import fake_service
from testkit.fixtures import StartService
from testkit.processes import eventually
from testkit.programs import path, source
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


async def tells(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
    totals = schema.Totals()
    web = schema.Service("web", 1, "running", 1, "cpu", "ebpf", None, 1.0, [], [], totals)
    return {"service": web}


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


def test_a_worker_collects_its_garbage() -> None:
    """Though the controller does not while it starts."""
    gc.disable()
    try:
        pid, pidfd = fork.fork(lambda: int(gc.isenabled()))
    finally:
        gc.enable()
    os.close(pidfd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    fork.remove_started(pid)


COUNTS = path("counts_imports")


def test_unix_sockets_of_others_are_looked_at_once(home: Path) -> None:
    """There may be thousands, and it takes a microsecond for each."""
    done = subprocess.run(
        [sys.executable, COUNTS], env=clean_environment(home), capture_output=True, text=True
    )
    assert "write pid file" in done.stderr  # after the name was claimed
    assert done.stdout == "1\n"


STARTS = source("starts")


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
