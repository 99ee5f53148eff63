"""`--log-format json`: whatever steer and its workers write to standard error is JSON."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from testkit.fixtures import RunSteer, StartService
from testkit.processes import eventually

APP = """
import sys

def exits(worker):
    print("out of order", file=sys.stderr)
    sys.exit(7)
"""
UNABLE = {
    "usage": (("--no-such-option",), 2, "No such option"),
    "no command": (("-w", "2", "--"), 2, "no command after --"),
    "value": (("-w", "0"), 1, "--workers: workers = '0': too small"),
    "file": (("-c", "missing.toml"), 1, "read missing.toml: no such file"),
    "address": (("-b", "127.0.0.1:99999"), 1, "99999"),
    "application": (("nothere:app",), 4, "load nothere:app: ModuleNotFoundError"),
    "workers": (("app:exits",), 3, "start workers: exit status 7"),
}


@pytest.mark.parametrize("way", ["command line", "environment"])
@pytest.mark.parametrize("arguments, code, words", UNABLE.values(), ids=UNABLE)
def test_why_a_service_does_not_start_is_json_to_the_last_line(
    steer: RunSteer,
    home: Path,
    environment: dict[str, str],
    way: str,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    (home / "app.py").write_text(APP)
    option = ("--log-format", "json") if way == "command line" else ()
    if way == "environment":
        environment["STEER_LOG_FORMAT"] = "json"
    done = steer("run", *option, *arguments)
    assert done.returncode == code
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    last = next(line for line in reversed(lines) if not line["message"].startswith("  | "))
    assert (last["level"], words in last["message"]) == ("error", True), last


def test_format_of_the_file_counts_as_soon_as_the_file_is_understood(
    steer: RunSteer, home: Path
) -> None:
    (home / "steer.toml").write_text('[service]\nlog_format = "json"\napp = "nothere:app"\n')
    done = steer("run")
    assert done.returncode == 4
    assert "load nothere:app: " in json.loads(done.stderr.splitlines()[-1])["message"]
    done = steer("run", "-w", "0")
    assert (done.returncode, done.stderr.startswith("steer: ")) == (1, True)


@pytest.mark.parametrize(
    "arguments", [("run", "-w", "0", "--", "x", "--log-format", "json"), ("stop", "nothere")]
)
def test_other_commands_and_those_of_workers_have_no_part_in_it(
    steer: RunSteer, arguments: tuple[str, ...]
) -> None:
    done = steer(*arguments)
    assert (done.returncode, done.stderr.startswith("steer: ")) == (1, True)


def test_the_guard_writes_as_the_service_does_after_a_reload(
    service: StartService, home: Path
) -> None:
    running = service("-w", "1")
    (home / "steer.toml").write_text('[service]\nlog_format = "json"\n')
    assert running.steer("reload").returncode == 0
    before = len(running.log)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    eventually(lambda: "the controller is gone" in running.log[before:])
    assert running.steer("stop").returncode == 0
    eventually(lambda: "the controller is gone: ending " in running.log[before:])
    assert all(json.loads(line)["message"] for line in running.log[before:].splitlines())
