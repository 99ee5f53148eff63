"""What is on the screen: in 80 columns, in colour, in place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from testkit.fixtures import RunSteer, StartService
from testkit.processes import DEADLINE_S
from testkit.service import STEER
from testkit.terminal import Terminal

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
GREEN, RED, YELLOW = "\x1b[32m", "\x1b[1;31m", "\x1b[33m"
COLUMNS = ("slot", "pid", "state", "gen", "cpus", "weight", "selected", "open", "queued")


def shown_on(*command: str, environment: Mapping[str, str], size: tuple[int, int]) -> str:
    """All that a command writes to a terminal until it ends."""
    shell = ("sh", "-c", '"$@"; echo END', "sh")
    terminal = Terminal(*shell, *command, environment=environment, size=size)
    try:
        terminal.read_until(lambda shown: shown.endswith("END\r\n"))
        return terminal.shown
    finally:
        terminal.close()


# On a terminal


def test_status_in_80_columns_has_a_line_for_each_worker_in_colour(
    service: StartService, environment: dict[str, str]
) -> None:
    at = tuple(part for port in range(8080, 8084) for part in ("-b", f"127.0.0.1:{port}"))
    running = service("-w", "3", "--policy", "hash", "--hang", "skip", "--hang-timeout=0", *at)
    pids = [worker["pid"] for worker in running.workers()]
    shown = shown_on(STEER, "status", environment=environment, size=(24, 80))
    lines = _CODES.sub("", shown).split("\r\n")
    assert max(map(len, lines)) <= 80
    (head,) = [number for number, line in enumerate(lines) if line.startswith("slot")]
    rows = lines[head + 1 : head + 4]
    assert [row.split()[:3] for row in rows] == [[str(n), str(pids[n]), "ready"] for n in range(3)]
    assert shown.count(f"{GREEN}ready") == 3
    environment["NO_COLOR"] = "1"
    plain = shown_on(STEER, "status", environment=environment, size=(24, 80))
    assert "ready" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)
    # In a file there is none, and there is room for all.
    done = running.steer("status")
    assert "\x1b" not in done.stdout
    assert "restarts" in done.stdout
    environment.update({"COLUMNS": "²", "LINES": "x"})
    again = shown_on(STEER, "status", environment=environment, size=(24, 80))
    assert "bug in steer" not in again


def test_states_have_their_colours(environment: dict[str, str], home: Path) -> None:
    environment["STEER_CONTROL_SOCKET"] = "/proc/none/steer.sock"
    shown = shown_on(STEER, "doctor", "--backlog", "65535", environment=environment, size=(50, 90))
    assert re.search(r"run-directory.*\x1b\[1;31mfail", shown)
    assert re.search(r"somaxconn.*\x1b\[33mwarn", shown)
    assert re.search(r"libbpf.*\x1b\[32mok", shown)


def test_watch_redraws_in_place_what_is_longer_than_the_screen(
    service: StartService, environment: dict[str, str]
) -> None:
    service("-w", "30", "--policy", "hash", "--hang-timeout=0")
    terminal = Terminal(STEER, "status", "--watch", environment=environment, size=(12, 80))
    try:
        frame = "\x1b[H"
        terminal.read_until(lambda shown: shown.count(frame) > 3)
        assert "\x1b[?1049h" in terminal.shown, "a screen of its own"
        for each in terminal.shown.split(frame)[1:-1]:
            assert each.count("\n") < 12, "it would scroll"
        terminal.type(b"\x03")
        assert terminal.process.wait(DEADLINE_S) == 130
        terminal.read_until(lambda shown: "\x1b[?1049l" in shown)
    finally:
        terminal.close()


# In the log, and on the command line


def test_what_is_refused_is_one_line_in_the_log_and_no_error(
    service: StartService, home: Path
) -> None:
    file = home / "mine.c"
    file.write_text('#include "steer.h"\nSTEER_POLICY(ctx, table)\n{\n\treturn nothing;\n}\n')
    running = service("-w", "1", "--policy", "hash")
    for command in (
        ("policy", str(file)),
        ("policy", "least-con"),
        ("drain", "0"),
        ("restart", "77"),
    ):
        before = len(running.log)
        done = running.steer(command[0], "test", *command[1:])
        assert done.returncode == 1
        (line,) = running.log[before:].splitlines()
        assert f"[WARNING] request {command[0]} refused: " in line
    assert "ERROR" not in running.log


def test_lists_of_commands_are_whole_in_80_columns(environment: dict[str, str]) -> None:
    for group in ((), ("policies",)):
        shown = shown_on(STEER, *group, "--help", environment=environment, size=(50, 80))
        assert "..." not in shown.partition("Commands:\r\n")[2].strip()
        assert "Commands:" in shown


@pytest.mark.parametrize(
    "command, argument",
    [("drain", "SLOT"), ("scale", "N"), ("policy", "POLICY"), ("restart", "SLOT")],
)
def test_missing_argument_is_the_one_that_is_missing(
    steer: RunSteer, command: str, argument: str
) -> None:
    done = steer(command)
    assert done.returncode == 2
    assert done.stderr.endswith(f"\nError: Missing argument '{argument}'.\n")
    assert f"steer {command} [OPTIONS] [NAME] {argument}\n" in done.stderr


def test_help_and_version(steer: RunSteer) -> None:
    assert steer("-V").stdout == steer("--version").stdout
    assert steer("help").stdout == steer("--help").stdout
    for command in (("run",), ("policies", "check"), ("status",)):
        assert steer("help", *command).stdout == steer(*command, "--help").stdout
    for command in (("nothing",), ("run", "x"), ("policies", "chek")):
        done = steer("help", *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"No such command '{command[-1]}'" in done.stderr


@pytest.mark.parametrize(
    "arguments, question",
    [
        (("-b", "25082"), "did you mean ':25082'?"),
        (("--policy", "least-con"), "did you mean 'least-conn'?"),
        (("--policy", "source", "--param", "prefix=3"), "did you mean 'prefix"),
        (("--backend", "epbf"), "did you mean 'ebpf'?"),
        (("--polcy", "hash"), "Did you mean '--policy'?"),
    ],
)
def test_what_was_probably_meant_is_asked(
    steer: RunSteer, arguments: tuple[str, ...], question: str
) -> None:
    done = steer("check", *arguments)
    assert done.returncode in (1, 2)
    assert question in done.stderr
    assert "--app" not in done.stderr
