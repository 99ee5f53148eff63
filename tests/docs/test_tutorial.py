"""docs/WRITE-A-POLICY.md, followed to the letter: every command, and all that it shows."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from testkit import ROOT
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S
from testkit.service import STEER

TUTORIAL = ROOT / "docs" / "WRITE-A-POLICY.md"


class Block(NamedTuple):
    language: str
    file: str
    text: str


def blocks() -> list[Block]:
    found = re.findall(
        r"^```(\w+) ?(\S*)\n(.*?)^```$", TUTORIAL.read_text(), re.DOTALL | re.MULTILINE
    )
    return [Block(*each) for each in found]


def shape(line: str) -> str:
    """A line without what differs from run to run: numbers, and the blanks between columns. Of a
    compiler's words, which differ from one to the next, where they are about."""
    line = re.sub(r"^  \| (\S+:\d+:\d+: \w+:)?.*", r"| \1", line)
    return re.sub(r"\s+", " ", re.sub(r"[\d.]+-\d+|\d+(\.\d+)*", "0", line.strip()))


def shell(script: str, environment: Mapping[str, str], home: Path) -> str:
    """What it prints."""
    done = subprocess.run(
        ["bash", "-c", script],
        env={**environment, "PATH": f"{Path(STEER).parent}:{environment['PATH']}"},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    return done.stdout.replace(f"{home}/", "")


@pytest.mark.needs("bcc", "bpf", "root")
def test_tutorial(service: StartService, environment: dict[str, str], home: Path) -> None:
    printed = ""
    for block in blocks():
        if block.language == "sh" and block.text.startswith("steer run "):
            service(*block.text.split()[2:], name="mine")
        elif block.language == "sh":
            printed = shell(block.text, environment, home)
            refused = "steer: " in printed
            print(block.text, printed, sep="\n")
        elif block.language == "text":
            shapes = [shape(line) for line in printed.splitlines()]
            missing = [line for line in block.text.splitlines() if shape(line) not in shapes]
            assert not missing, f"{missing} not in\n{printed}"
            assert refused == ("steer: " in block.text), printed
        elif block.language == "c":
            (home / block.file).write_text(block.text)
        else:
            (home / "steer.toml").write_text(block.text)
