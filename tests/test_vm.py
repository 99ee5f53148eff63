"""`./dev vm`, as far as it goes without a VM: what is chosen, and what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import DEADLINE_S

from vm import __main__ as command
from vm import accel, boot, cache, cards, kernels, matrix, root
from vm.boot import Machine
from vm.errors import VmError
from vm.kernels import Kernel

KERNEL = Kernel("6.1.0-56-amd64", Path("/bin/true"))
UP, DONE = "echo 'steer: up' >&2", "echo 'steer: done' >&2"
KERNEL_SAYS = "[   11.151159] Kernel panic"
Tool = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Put a program, a shell script, before those that are there."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o755)

    return make


# ---- kernels

APT_CACHE = """
shift 3  # -q -c FILE
case $1 in
pkgnames) printf '%s\\n' linux-image-6.1.0-9-amd64 linux-image-6.1.0-56-amd64 \\
    linux-image-6.1.0-56-cloud-amd64 linux-image-6.1.0-56-amd64-dbg \\
    linux-image-6.1.0-0.deb11.52-amd64 linux-image-6.1.0-57-rt-amd64 ;;
madison) shift; for each; do case $each in
    *-9-amd64) echo "$each | 6.1.99-9 | somewhere" ;;
    *) echo "$each | 6.1.192-2 | somewhere" ;; esac; done ;;
esac
"""


def test_newest_generic_kernel_of_a_series(tmp_path: Path, tool: Tool) -> None:
    tool("apt-get", "exit 0")
    tool("apt-cache", APT_CACHE)
    apt = kernels._Apt(tmp_path)
    assert kernels._newest(apt, "6.1") == "linux-image-6.1.0-56-amd64"
    with pytest.raises(VmError, match=r"kernel 6\.2: Debian's .* have none, or are out of reach"):
        kernels._newest(apt, "6.2")


def test_kept_kernel_is_not_fetched_again(tool: Tool) -> None:
    tool("apt-get", "exit 1")
    for release in ("6.1.0-9-amd64", "6.1.0-56-amd64", "6.12.0-1-amd64"):
        (cache.directory("kernels") / release).mkdir()
    found = kernels.find("6.1")
    assert found.release == "6.1.0-56-amd64"
    assert found.image.name == "vmlinuz-6.1.0-56-amd64"


def test_kernel_by_its_file(tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    assert kernels.find(str(image)) == Kernel("bzImage", image)
    image.write_bytes(b"ELF" * 1000)
    with pytest.raises(VmError, match=rf"kernel {image}: it is no bzImage; vmlinux is none either"):
        kernels.find(str(image))
    with pytest.raises(VmError, match=rf"kernel {tmp_path}: Is a directory"):
        kernels.find(str(tmp_path))
    with pytest.raises(VmError, match=r"kernel none: No such file or directory; give a series"):
        kernels.find("./none")


# ---- the accelerator


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A /dev/kvm, which this machine may lack."""
    monkeypatch.setattr(accel.os, "access", lambda *_: True)


def test_kvm_that_works(device: None, tool: Tool) -> None:
    tool(accel.QEMU, "echo 'Linux version 6.1'")
    assert accel.why_not(KERNEL, 8) == ""


@pytest.mark.parametrize(
    "does, why_not",
    [
        ("echo 'x: error: failed to set MSR 0x10a' >&2; exit 134", "x: error: failed to set MSR"),
        ("exit 0", "KVM does not come up"),
        ("exec sleep 60", "a kernel is not up under KVM within 0.1 s"),
    ],
)
def test_kvm_that_does_not(
    device: None, tool: Tool, does: str, why_not: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "_LIMIT_S", 0.1)
    tool(accel.QEMU, does)
    assert accel.why_not(KERNEL, 8).startswith(why_not)


def test_kernel_built_anew_is_tried_again(device: None, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "bzImage").touch()
    kernel = Kernel("bzImage", tmp_path / "bzImage")
    tool(accel.QEMU, "exit 1")
    assert accel.why_not(kernel, 8)
    tool(accel.QEMU, "echo 'Linux version 6.1'")
    assert accel.why_not(kernel, 8)
    (tmp_path / "bzImage").write_text("better")
    assert not accel.why_not(kernel, 8)


def test_kvm_is_tried_once_for_a_kernel(device: None, tool: Tool, tmp_path: Path) -> None:
    tool(accel.QEMU, f"echo once >> {tmp_path}/tries; echo 'qemu: error: no' >&2; exit 1")
    assert accel.why_not(KERNEL, 8) == accel.why_not(KERNEL, 8) == "qemu: error: no"
    accel.why_not(KERNEL, 4)
    assert (tmp_path / "tries").read_text().split() == ["once", "once"]


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel.os, "access", lambda *_: False)
    assert accel.why_not(KERNEL, 8) == "no /dev/kvm that may be used"


# ---- the machine


@pytest.fixture
def image(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "image", lambda: Path("/root.squashfs"))
    monkeypatch.setattr(accel, "why_not", lambda *_: "no KVM here")
    monkeypatch.setattr(cards, "can_wire", lambda: False)
    tool(accel.QEMU, "")
    tool("vng", "")


@pytest.mark.parametrize("nodes, wanted", [(1, []), (2, ["0-3", "4-7"]), (4, ["0-1", "2-3"])])
def test_numa_nodes(image: None, tool: Tool, nodes: int, wanted: list[str]) -> None:
    tool(accel.QEMU, "")
    command = boot._vng(Machine(KERNEL, nodes=nodes), Path("/share"))
    given = [after for each, after in pairwise(command) if each == "--numa"]
    assert given[: len(wanted)] == [f"{4096 // nodes}M,cpus={cpus}" for cpus in wanted]
    assert len(given) == (nodes if nodes > 1 else 0)
    assert "--disable-kvm" in command


def test_network_cards(image: None, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a queue for every CPU, where their other ends can be had."""
    tool(accel.QEMU, "")
    machine = Machine(KERNEL, cpus=4)
    assert "ifname=many" not in " ".join(boot._vng(machine, Path("/share")))
    monkeypatch.setattr(cards, "can_wire", lambda: True)
    told = " ".join(boot._vng(machine, Path("/share")))
    assert "ifname=many,script=no,downscript=no,vhost=off,queues=4 " in told
    assert cards.wired(["vng"])[-2:] == ["wires", "vng"]


def test_guest_sees_the_tree_and_the_files(image: None, tool: Tool, tmp_path: Path) -> None:
    mine = tmp_path / "mine.c"
    mine.write_text("int x;")
    with boot._share([mine]) as share:
        assert (share / "mine.c").read_text() == "int x;"
        assert os.access(share / "enter", os.X_OK)
        with tarfile.open(share / "tree.tar") as tar:
            names = set(tar.getnames())
    assert not share.exists()
    assert any(name.startswith("steer/__pycache__/cli.") for name in names)
    assert {"dev", "steer/cli.py", "bpf/steer.h", "tests/test_vm.py"} <= names
    assert not any(name.startswith((".git/", ".venv/")) for name in names)


def test_output_and_status_are_the_commands(
    image: None, tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    tool(accel.QEMU, "")
    tool(
        "vng",
        f"echo early >&2; {UP}; echo late >&2; echo said; echo '{KERNEL_SAYS}' >&2; {DONE}; exit 3",
    )
    assert boot.run(Machine(KERNEL), ["true"]) == 3
    assert capsys.readouterr() == ("said\n", "vm: 6.1.0-56-amd64, emulated: no KVM here\nlate\n")


def test_guest_whose_kernel_dies(image: None, tool: Tool) -> None:
    tool(accel.QEMU, "")
    tool("vng", f"{UP}; echo said; echo '{KERNEL_SAYS}' >&2; exit 255")
    with pytest.raises(VmError, match=r"^run in 6\.1\.0-56-amd64: its kernel died$") as caught:
        boot.run(Machine(KERNEL), ["true"])
    assert caught.value.detail == KERNEL_SAYS


@pytest.mark.parametrize(
    "does, cause",
    [
        ("echo 'Kernel panic' >&2; exit 0", "it did not come up"),
        ("echo 'Kernel panic' >&2; exec sleep 60", r"the guest was not up within 0\.3 s"),
    ],
)
def test_guest_that_does_not_come_up(
    image: None, tool: Tool, does: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "_UP_S", 0.3)
    tool(accel.QEMU, "")
    tool("vng", does)
    with pytest.raises(VmError, match=rf"^boot 6\.1\.0-56-amd64: {cause}") as caught:
        boot.run(Machine(KERNEL), ["true"])
    assert "Kernel panic" in caught.value.detail


def test_no_qemu(image: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(VmError, match="install qemu-system-x86"):
        boot._vng(Machine(KERNEL), Path("/share"))


# ---- the command


def test_boot_is_meant_where_no_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    booted = []
    monkeypatch.setattr(kernels, "find", lambda name: Kernel(name, Path("/k")))
    monkeypatch.setattr(boot, "run", lambda machine, words: booted.append((machine, words)) or 0)
    monkeypatch.setattr(boot, "shell", lambda machine: booted.append((machine, ())) or 0)
    for words in (["--kernel", "5.10", "--", "uname", "-r"], [], ["boot", "--cpus", "4"]):
        assert CliRunner().invoke(command.main, words).exit_code == 0
    assert [(each.kernel.release, each.cpus, words) for each, words in booted] == [
        ("5.10", 8, ("uname", "-r")),
        (kernels.SERIES[-1], 8, ()),
        (kernels.SERIES[-1], 4, ()),
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--cpus", "7", "--nodes", "2"], "7 CPUs cannot be parted among 2 nodes of equal size"),
        (["--cpus", "0"], "0 is not in the range"),
        (["--memory", "10"], "10 is not in the range"),
        (["--kernel", "6.1", "test"], "test comes before its options; or say: -- test"),
        (["run", "--policy", "hash", "--connections", "0"], "0 is not in the range"),
        (["test", "--cells", "vm/tests"], "--cells runs no tests, but some are named"),
    ],
)
def test_machine_that_cannot_be(words: list[str], said: str) -> None:
    done = CliRunner().invoke(command.main, words)
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize(
    "words, cause",
    [
        (["--policy", "nonsense"], "policy nonsense: unknown; cpu, round-robin"),
        (["--policy", "./none.c"], "policy ./none.c: no such file"),
    ],
)
def test_policy_that_is_not_there_boots_nothing(words: list[str], cause: str) -> None:
    done = CliRunner().invoke(command.main, ["run", *words], standalone_mode=False)
    assert str(done.exception).startswith(cause)


@pytest.mark.parametrize("number, status", [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_guest_ends_with_its_command(tmp_path: Path, tool: Tool, number: str, status: int) -> None:
    """At once, and with nothing left."""
    tool(accel.QEMU, "")
    tool("vng", f"{UP}; echo $$ > {tmp_path}/pid; echo begun; exec sleep 300")
    program = """
import signal
from pathlib import Path
from vm import __main__ as vm, accel, boot, cards, command, kernels, root
# Whoever runs the tests may ignore them, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
root.image = lambda: Path("/root.squashfs")
accel.why_not = lambda *_: ""
cards.can_wire = lambda: False
kernels.find = lambda name: kernels.Kernel(name, Path("/bin/true"))
raise SystemExit(command.run(vm.main, "vm"))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, "--", "true"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.Signals[f"SIG{number}"])
        assert process.wait(DEADLINE_S) == status
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert not list(tmp_path.glob("steer-vm-*"))


# ---- the matrix


def test_what_pytest_said() -> None:
    seen = matrix.Tests()
    for line in (
        "....ss [ 10%]",
        "SKIPPED [14] tests/conftest.py:129: needs migrate: Linux 5.10 has not got it; 5.14 has",
        "SKIPPED [2] tests/conftest.py:129: needs migrate: Linux 5.10 has not got it; 5.14 has",
        "667 passed, 16 skipped in 750.63s (0:12:30)",
    ):
        seen.hear(line)
    assert seen.outcome == "667 passed, 16 skipped"
    assert list(seen.skipped.values()) == [16]
    assert "needs migrate" in next(iter(seen.skipped))


MACHINE = '{"kind":"machine","release":"6.1","version":"","cpu":"","cpus":8,"probes":{}}'
CELL = '{"kind":"cell","policy":"cpu","asked":"ebpf","got":"ebpf","works":%s,"took_s":1.0}'


@pytest.mark.parametrize(
    "lines, status, said",
    [
        ([MACHINE, CELL % "true", "3 passed in 1.00s"], 0, ""),
        ([MACHINE, CELL % "false", "3 passed in 1.00s"], 1, "cpu on ebpf: does not work"),
        ([MACHINE, CELL % "true", "1 failed in 1.00s", "exit 1"], 1, "6.1: tests: 1 failed"),
        ([MACHINE, MACHINE[:20]], 1, "read what 5.10 said: "),
        ([], 1, "read what 5.10 said: 0 machines"),
    ],
)
def test_matrix_fails_on_what_is_not_explained(
    lines: list[str], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(machine: Machine, words: list[str], heard: Callable[[str], None]) -> int:
        for line in lines:
            heard(f"{line}\n")
        return int("exit 1" in lines)

    monkeypatch.setattr(boot, "run", run)
    monkeypatch.setattr(kernels, "find", lambda name: Kernel(name, Path("/k")))
    done = CliRunner().invoke(
        command.main, ["test", "--kernel", "5.10"], standalone_mode=False, catch_exceptions=False
    )
    assert done.return_value == status
    assert said in done.output


def test_steps_of_the_matrix_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are taken, and the worst status is told."""

    def run(_: Machine, words: list[str], heard: Callable[[str], None]) -> int:
        done = subprocess.run(words, capture_output=True, text=True)
        heard(done.stdout)
        return done.returncode

    monkeypatch.setattr(boot, "run", run)
    heard: list[str] = []
    steps = [["sh", "-c", "exit 3"], ["printf", "%s-", "not a and not b", "c"]]
    assert matrix._steps(Machine(KERNEL), steps, heard.append) == 3
    assert heard == ["not a and not b-c-"]


def test_matrix_goes_on_after_a_kernel_that_does_not_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(machine: Machine, words: list[str], heard: Callable[[str], None]) -> int:
        if machine.kernel.release == "5.10":
            raise VmError("boot 5.10", "it did not come up", detail="Kernel panic")
        heard(MACHINE)
        heard(CELL % "true")
        return 0

    monkeypatch.setattr(boot, "run", run)
    monkeypatch.setattr(kernels, "find", lambda name: Kernel(name, Path("/k")))
    asked = ["test", "--cells", "--kernel", "5.10", "--kernel", "6.1", "--report"]
    done = CliRunner().invoke(command.main, [*asked, f"{tmp_path}/K.md"], standalone_mode=False)
    assert done.return_value == 1
    assert "vm: boot 5.10: it did not come up\nKernel panic" in done.output
    assert "| cpu | ebpf | works |" in (tmp_path / "K.md").read_text()
