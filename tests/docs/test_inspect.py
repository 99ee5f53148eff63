"""docs/INSPECT.md, followed to the letter: every command, and all that it shows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from steer.linux import netns as namespaces
from steer.linux import processes
from testkit import ROOT
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually
from testkit.service import STEER

PAGE = ROOT / "docs" / "INSPECT.md"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shape(line: str) -> str:
    """A line without what differs from run to run and from machine to machine: numbers, lists of
    them, tags, the lengths of bars, cgroups and the blanks between columns."""
    line = re.sub(r"(?<=tag )\w+", "", line)
    line = re.sub(r"[\d.]+(?:[-,][\d.]+)*", "0", line)
    line = re.sub(r"(?<= )/\S*|(?<= )-(?= |$)", "/", line)
    return re.sub(r"\s+", " ", re.sub("#+", "#", line)).strip()


@pytest.fixture
def left(netns: Netns) -> Iterator[None]:
    """Daemons that the page starts are ended."""
    yield
    own = namespaces.own()
    for pid in processes.all_pids():
        with suppress(OSError):
            if pid != os.getpid() and os.stat(f"/proc/{pid}/ns/net").st_ino == own:
                os.kill(pid, signal.SIGKILL)


def shell(script: str, environment: Mapping[str, str], home: Path) -> str:
    """What it prints."""
    tools = f"{Path(STEER).parent}:{Path(sys.executable).parent}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**environment, "PATH": f"{tools}:{environment['PATH']}"},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def missing(text: str, script: str, environment: Mapping[str, str], home: Path) -> list[str]:
    """Lines of the page that the command does not print."""
    shapes = {shape(line) for line in shell(script, environment, home).splitlines()}
    return [line for line in text.splitlines() if shape(line) not in shapes]


@pytest.mark.needs("bpf", "migrate", "pidfd_getfd", "counting", "root", "haproxy", "gunicorn")
@pytest.mark.usefixtures("left")
def test_page(environment: dict[str, str], home: Path) -> None:
    last = ""
    for language, file, text in BLOCK.findall(PAGE.read_text()):
        if language == "sh":
            last = text
            if "steer inspect" not in text:
                shell(text, environment, home)
        elif language == "text" and "--for" in last:
            assert missing(text, last, environment, home) == []
        elif language == "text":
            # Servers that were started may still be about to listen.
            eventually(lambda: missing(text, last, environment, home), [])  # noqa: B023
        else:
            (home / file).write_text(text)
