"""`./dev vm test`: what becomes of what the kernels say; see test_vm_cells.py for what they do."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from vm import __main__ as command
from vm import boot, kernels, matrix
from vm.boot import Machine
from vm.errors import VmError
from vm.kernels import Kernel

ENDED = "steer: ended with"
Guest = Callable[[Machine, Sequence[str], Callable[[str], None]], int]


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Callable[[Guest], None]:
    """What stands for the guest, and all kernels are there."""

    def stand_in(run: Guest) -> None:
        monkeypatch.setattr(boot, "run", lambda machine, words, heard: run(machine, words, heard))
        monkeypatch.setattr(kernels, "find", lambda name: Kernel(name, Path("/k")))

    return stand_in


def ask(*words: str) -> tuple[int, str]:
    """`./dev vm test`: its status, and what it says."""
    done = CliRunner().invoke(
        command.main, ["test", *words], standalone_mode=False, catch_exceptions=False
    )
    return done.return_value, done.output


def test_what_pytest_said() -> None:
    seen = matrix.Tests()
    for line in (
        "....ss [ 10%]",
        "SKIPPED [14] tests/conftest.py:129: needs migrate: Linux 5.10 cannot migrate",
        "SKIPPED [2] tests/conftest.py:129: needs migrate: Linux 5.10 cannot migrate",
        "667 passed, 16 skipped in 750.63s (0:12:30)",
    ):
        seen.hear(line)
    assert seen.outcome == "667 passed, 16 skipped"
    assert list(seen.skipped.values()) == [16]
    assert "needs migrate" in next(iter(seen.skipped))


MACHINE = '{"kind":"machine","release":"6.1","version":"","cpu":"","cpus":8,"probes":{}}'
CELL = '{"kind":"cell","policy":"cpu","asked":"ebpf","got":"ebpf","works":%s,"took_s":1.0}'
GOOD = [MACHINE, CELL % "true", f"{ENDED} 0"]


@pytest.mark.parametrize(
    "lines, status, said",
    [
        ([*GOOD, "3 passed in 1.00s", f"{ENDED} 0"], 0, ""),
        ([*GOOD, '{"slot": 3}', "3 passed in 1.00s", f"{ENDED} 0"], 0, ""),
        ([MACHINE, CELL % "false", f"{ENDED} 0", f"{ENDED} 0"], 1, "cpu on ebpf: does not work"),
        ([*GOOD, "1 failed in 1.00s", f"{ENDED} 1"], 1, "6.1: tests: 1 failed"),
        ([*GOOD, f"....{ENDED} 139"], 1, "6.1: tests: did not end"),
        ([*GOOD], 1, "6.1: tests: did not end"),
        ([MACHINE, f"{ENDED} 3", "3 passed in 1s", f"{ENDED} 0"], 1, "6.1: cells: exit status 3"),
        ([MACHINE, MACHINE[:20], f"{ENDED} 1", f"{ENDED} 0"], 1, "read what 5.10 said: "),
        ([], 1, "read what 5.10 said: 0 machines"),
    ],
)
def test_matrix_fails_on_what_is_not_explained(
    lines: list[str], status: int, said: str, boots: Callable[[Guest], None]
) -> None:
    def run(_: Machine, __: Sequence[str], heard: Callable[[str], None]) -> int:
        for line in lines:
            heard(f"{line}\n")
        return 0 if len(lines) > len(GOOD) else 9

    boots(run)
    returned, output = ask("--kernel", "5.10")
    assert (returned, said in output) == (status, True), output


def test_steps_in_the_guest(boots: Callable[[Guest], None]) -> None:
    """All are taken, whatever becomes of them, with their words as they are."""

    def run(_: Machine, words: Sequence[str], heard: Callable[[str], None]) -> int:
        done = subprocess.run(words, capture_output=True, text=True)
        for line in done.stdout.splitlines(keepends=True):
            heard(line)
        return done.returncode

    boots(run)
    heard: dict[int, list[str]] = {0: [], 1: [], 2: []}
    commands = [["sh", "-c", "exit 3"], ["printf", "%s-", "not a and not b", "c"], ["echo", "d"]]
    steps = [matrix._Step(words, heard[at].append) for at, words in enumerate(commands)]
    assert matrix._in_guest(Machine(Kernel("6.1", Path("/k"))), steps) == [3, 0, 0]
    assert heard == {0: [], 1: ["not a and not b-c-\n"], 2: ["d\n"]}


def test_steps_on_the_host() -> None:
    heard: list[str] = []
    for code, status in (("print('a')", 0), ("import os; os.kill(os.getpid(), 11)", -11)):
        assert matrix._on_host(matrix._Step(["python", "-c", code], heard.append)) == status
    assert heard == ["a\n"]


CLEANS_UP = """
import pathlib, sys, time
try:
    print("begun", flush=True)
    time.sleep(600)
finally:
    time.sleep(0.2)
    pathlib.Path(sys.argv[1]).touch()
"""


def test_interrupted_on_the_host_it_is_left_to_clean_up(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        assert line == "begun\n"
        raise KeyboardInterrupt

    step = matrix._Step(["python", "-c", CLEANS_UP, f"{tmp_path}/cleaned"], interrupt)
    with pytest.raises(KeyboardInterrupt):
        matrix._on_host(step)
    assert (tmp_path / "cleaned").exists()


def test_matrix_goes_on_after_a_kernel_that_does_not_boot(
    tmp_path: Path, boots: Callable[[Guest], None]
) -> None:
    def run(machine: Machine, _: Sequence[str], heard: Callable[[str], None]) -> int:
        if machine.kernel.release == "5.10":
            raise VmError("boot 5.10", "it did not come up", detail="Kernel panic")
        for line in GOOD:
            heard(f"{line}\n")
        return 0

    boots(run)
    report = tmp_path / "K.md"
    asked = ("--cells", "--kernel", "5.10", "--kernel", "6.1", "--report", str(report))
    returned, output = ask(*asked)
    assert returned == 1
    assert "vm: boot 5.10: it did not come up\nKernel panic" in output
    assert "| cpu | ebpf | works |" in report.read_text()
    assert "- boot 5.10: it did not come up\n    Kernel panic\n" in report.read_text()


def test_report_that_cannot_be_written_is_seen_before(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "not there" / "K.md"):
        done = CliRunner().invoke(command.main, ["test", "--report", str(path)])
        assert done.exit_code
        assert str(path) in f"{done.output}{done.exception}"
