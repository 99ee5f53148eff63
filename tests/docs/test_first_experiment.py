"""docs/FIRST-EXPERIMENT.md, followed to the letter: once here, and once what is for the VM in a VM.

Here, `./dev vm` is played: what would be run in the guest is run in a network namespace.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from testkit import ROOT
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S
from testkit.service import STEER
from vm import __main__ as vm
from vm import boot, kernels
from vm.kernels import Kernel

PAGE = ROOT / "docs" / "FIRST-EXPERIMENT.md"
POLICY = "first.c"
LIVE = "## The same, live"
"""Where the part that is followed in the VM ends."""
VM_DEADLINE_S = 600
"""The first time kernel and root file system are made."""
SAME_BOOT = "boots as those that are run in a VM do; a boot more takes a minute"
NOT_RUN = {
    "./dev vm --kernel 6.1 -- uname -r": SAME_BOOT,
    "./dev vm --kernel 6.1": "a shell wants a terminal",
    "./dev vm --kernel 6.1 --cpus 16 --nodes 4 -- lscpu": SAME_BOOT,
    "./dev vm run --kernel ~/linux/arch/x86/boot/bzImage --policy ./first.c": "no such kernel",
    "vng --kconfig \\": "a kernel takes too long to build",
    "vagrant up": "wants a hypervisor; see test_vagrant.py",
    "rm -r ~/.cache/steer/vm": "it is wanted again",
}
"""First lines of the blocks that no test runs, and why."""
ONLY_PLAYED = "./dev vm run --kernel 6.1 --policy ./first.c"
"""The same command is run in a VM after the edit."""


class Block(NamedTuple):
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    return [Block(*each) for each in found]


def commands() -> list[str]:
    return [block.text for block in blocks(PAGE.read_text()) if block.language == "sh"]


def is_run(command: str) -> bool:
    return command.splitlines()[0] not in NOT_RUN


def played(command: str) -> str:
    """What the guest would run."""
    if found := re.fullmatch(r"\./dev vm run --kernel \S+ --policy (\S+)(.*)", command):
        return f"python -m vm.trial {found[1]}{found[2]}"
    return re.sub(r"^\./dev vm --kernel \S+ -- ", "", command)


def shape(line: str) -> str:
    """A line without what differs from run to run: numbers, and the blanks between columns."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.]+-\d+|\d+(\.\d+)*", "0", line.strip()))


def assert_shown(wanted: str, printed: str) -> None:
    shapes = [shape(line) for line in printed.splitlines()]
    missing = [line for line in wanted.splitlines() if shape(line) not in shapes]
    assert not missing, f"{missing} not in\n{printed}"
    assert wanted.count("cost of a call") in (0, printed.count("cost of a call"))


def shell(script: str, environment: Mapping[str, str], where: Path, deadline_s: float) -> str:
    """What it prints. Told to end at the deadline, so that it can end what it has started."""
    with subprocess.Popen(
        ["bash", "-c", script],
        env={**environment, "PATH": f"{Path(STEER).parent}:{environment['PATH']}"},
        cwd=where,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=deadline_s)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)
    return printed.replace(f"{where}/", "")


@pytest.mark.needs("bcc", "bpf", "root")
@pytest.mark.timeout(240)
def test_followed_here(service: StartService, environment: dict[str, str], home: Path) -> None:
    environment["PYTHONPATH"] = str(ROOT)
    printed = ""
    for block in blocks(PAGE.read_text()):
        if block.language == "sh" and block.text.startswith("steer run "):
            service(*block.text.split()[2:], name="first")
        elif block.language == "sh":
            printed = ""
            if is_run(block.text):
                printed = shell(played(block.text), environment, home, DEADLINE_S)
                print(block.text, printed, sep="\n")
        elif block.language == "text" and printed:
            assert_shown(block.text, printed)
            assert ("steer: " in printed) == ("steer: " in block.text), printed
        elif block.language == "console" and "STEER_POLICY" in block.text:
            assert (home / POLICY).read_text().endswith(f"{block.text}\n")


@pytest.fixture
def policy_in_tree() -> Iterator[Path]:
    """The guest has what is in the tree. Whoever followed the page has his own there: put aside."""
    policy = ROOT / POLICY
    aside = policy.with_name(f"{POLICY}.aside")
    assert not aside.exists(), f"a test that was killed put {aside} aside: rename it to {POLICY}"
    if policy.exists():
        policy.rename(aside)
    yield policy
    policy.unlink(missing_ok=True)
    if aside.exists():
        aside.rename(policy)


@pytest.mark.needs("vm", "bcc")
@pytest.mark.timeout(900)
def test_followed_in_a_vm(policy_in_tree: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "STEER_" not in name}
    ran = {}
    printed = ""
    for block in blocks(PAGE.read_text().partition(LIVE)[0]):
        if block.language == "sh":
            printed = ""
            if is_run(block.text) and block.text != ONLY_PLAYED:
                printed = shell(block.text, environment, ROOT, VM_DEADLINE_S)
                ran[block.text] = printed
                print(block.text, printed, sep="\n")
        elif block.language == "text" and printed:
            assert_shown(block.text, printed)
    [tried] = [output for command, output in ran.items() if command.startswith("./dev vm run ")]
    selected = re.findall(r"^\d+ +\d+ +ready +\d+ +\S+ +\d+ +(\d+)", tried, re.MULTILINE)
    assert selected == ["50"] * 8


@pytest.mark.parametrize("command", [each for each in commands() if each.startswith("./dev vm")])
def test_vm_takes_the_options(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find", lambda name: Kernel(name, Path("/k")))
    monkeypatch.setattr(boot, "run", lambda *_: 0)
    monkeypatch.setattr(boot, "shell", lambda *_: 0)
    monkeypatch.chdir(tmp_path)
    Path(POLICY).write_text('#include "steer.h"\nSTEER_POLICY(ctx, table) { return 0; }\n')
    done = CliRunner().invoke(vm.main, shlex.split(command)[2:])
    assert done.exit_code == 0, done.output or done.exception


def test_what_is_not_run_is_there() -> None:
    firsts = {command.splitlines()[0] for command in commands()}
    assert {*NOT_RUN, ONLY_PLAYED} <= firsts


def test_vagrant_knows_the_options() -> None:
    known = (ROOT / "Vagrantfile").read_text()
    for option in re.findall(r"STEER_VM_\w+", PAGE.read_text()):
        assert f'"{option}"' in known


@pytest.mark.needs("vm")
def test_vng_knows_the_options() -> None:
    vng = Path(sys.executable).with_name("vng")
    told = subprocess.run([vng, "--help"], capture_output=True, text=True, timeout=DEADLINE_S)
    [command] = [each for each in commands() if each.startswith("vng ")]
    assert set(re.findall(r"--\w+", command)) <= set(re.findall(r"--\w+", told.stdout))
