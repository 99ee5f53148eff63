"""`steer attach` with few capabilities: what is missing is named, and what would help."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from testkit.attached import HOST, Attach, attaching, threads
from testkit.confine import setpriv
from testkit.harness import PORT
from testkit.processes import eventually
from testkit.service import STEER

pytestmark = [
    pytest.mark.needs("netns", "root", "bpf", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

LIMITED = ("bpf", "net_admin", "sys_ptrace")


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


def test_root_without_ptrace_is_not_told_to_run_as_root(
    home: Path, environment: Mapping[str, str]
) -> None:
    command = [*setpriv("bpf", "net_admin", "perfmon"), STEER, "attach", f"{HOST}:{PORT}"]
    with threads(2):
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no process can be seen that has it open; needs CAP_SYS_PTRACE" in done.stderr


def test_without_perfmon_closing_is_not_seen_and_the_cure_is_named(attach: Attach) -> None:
    with threads(2):
        attached = attach(under=setpriv(*LIMITED))
        (said,) = (line for line in attached.log.splitlines() if "are not seen in time" in line)
    assert "ENOSPC" not in said
    assert "give CAP_PERFMON too" in said


@pytest.mark.needs("tracing")
def test_guard_without_sys_admin_names_it(attach: Attach) -> None:
    with threads(2):
        attached = attach(under=setpriv(*LIMITED, "perfmon"))
        os.killpg(attached.pid, signal.SIGKILL)
        attached.wait()
        eventually(lambda: "the attacher is gone" in attached.log)
    assert "EPERM; needs CAP_SYS_ADMIN" in attached.log
