"""Runs of pytest: what all say is seen, and whichever fails is told by the exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testkit import ROOT, side_by_side
from testkit.processes import eventually

RUNS_BOTH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from testkit import side_by_side
raise SystemExit(side_by_side.main(["first"], ["other"]))
"""


def write(directory: Path, **tests: str) -> None:
    (directory / "pytest.ini").write_text("[pytest]\n")
    for name, body in tests.items():
        (directory / name).mkdir()
        (directory / name / f"test_{name}.py").write_text(f"def test_{name}():\n    {body}\n")


def run(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUNS_BOTH]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


@pytest.mark.parametrize(
    "first, other, status",
    [("pass", "pass", 0), ("assert 0", "pass", 1), ("pass", "assert 0", 1)],
)
def test_whichever_fails_is_told(tmp_path: Path, first: str, other: str, status: int) -> None:
    write(tmp_path, first=first, other=other)
    done = run(tmp_path)
    assert done.returncode == status
    assert done.stdout.count("FAILED") == status
    outcomes = "1 failed, 1 passed" if status else "2 passed"
    assert done.stdout.splitlines()[-1].startswith(f"===== {outcomes} in ")


def test_signals_are_not_ignored_in_any(tmp_path: Path) -> None:
    """As they would be in what a shell runs in the background."""
    ask = "import signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    write(tmp_path, first=ask, other=ask)
    assert run(tmp_path).returncode == 0


def test_all_are_interrupted(tmp_path: Path) -> None:
    body = "open(__file__ + '.begun', 'x').close(); import time; time.sleep(100)"
    write(tmp_path, first=body, other=body)
    command = [sys.executable, "-c", RUNS_BOTH]
    with subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True) as process:
        eventually(lambda: len(list(tmp_path.glob("*/*.begun"))), 2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0


def test_every_file_is_run_once() -> None:
    named = [ROOT / each for run in side_by_side.runs() for each in run]
    ran = [
        file for each in named for file in ([each] if each.is_file() else each.rglob("test_*.py"))
    ]
    assert sorted(ran) == sorted((ROOT / "tests").rglob("test_*.py"))
