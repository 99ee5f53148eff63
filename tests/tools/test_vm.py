"""`./dev vm`, as far as it goes without a VM: what is chosen, and what is said."""

from __future__ import annotations

import os
import pty
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import IO

import pytest
from click.testing import CliRunner

from steer.loader import compile
from testkit import ROOT
from testkit.capabilities import require
from testkit.processes import DEADLINE_S, is_ready
from testkit.programs import path
from vm import __main__ as command
from vm import accel, boot, cache, cards, kernels, root
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
    tool("apt-get", "echo 'W: no network' >&2")
    tool("apt-cache", APT_CACHE)
    apt = kernels._Apt(tmp_path)
    assert kernels._newest(apt, "6.1") == "linux-image-6.1.0-56-amd64"
    said = r"kernel 6\.2: Debian's .* have none, or are out of reach"
    with pytest.raises(VmError, match=said) as caught:
        kernels._newest(apt, "6.2")
    assert caught.value.detail == "W: no network"


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
    ],
)
def test_kvm_that_does_not(device: None, tool: Tool, does: str, why_not: str) -> None:
    tool(accel.QEMU, does)
    assert accel.why_not(KERNEL, 8).startswith(why_not)


def test_kvm_that_hangs(device: None, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "_LIMIT_S", 0.1)
    tool(accel.QEMU, "exec sleep 60")
    assert accel.why_not(KERNEL, 8) == "a kernel is not up under KVM within 0.1 s"


def test_kernel_built_anew_is_tried_again(device: None, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "bzImage").touch()
    kernel = Kernel("bzImage", tmp_path / "bzImage")
    tool(accel.QEMU, "exit 1")
    assert accel.why_not(kernel, 8)
    tool(accel.QEMU, "echo 'Linux version 6.1'")
    assert accel.why_not(kernel, 8)
    (tmp_path / "bzImage").write_text("better")
    assert not accel.why_not(kernel, 8)


def test_kvm_is_tried_once_for_a_kernel_and_its_cpus(
    device: None, tool: Tool, tmp_path: Path
) -> None:
    tool(accel.QEMU, f"echo once >> {tmp_path}/tries; echo 'qemu: error: no' >&2; exit 1")
    other = Kernel("other", Path("/bin/false"))
    for kernel, cpus in 2 * [(KERNEL, 8), (KERNEL, 4), (other, 8)]:
        assert accel.why_not(kernel, cpus) == "qemu: error: no"
    assert (tmp_path / "tries").read_text().split() == 3 * ["once"]


@pytest.mark.parametrize("answer, tries", [("no", 2), ("Linux version", 1)])
def test_kvm_that_did_not_work_is_tried_again_later(
    device: None, tool: Tool, tmp_path: Path, answer: str, tries: int
) -> None:
    tool(accel.QEMU, f"echo once >> {tmp_path}/tries; echo {answer}")
    accel.why_not(KERNEL, 8)
    [kept] = cache.directory("kvm-answers").iterdir()
    then_s = kept.stat().st_mtime - accel._NO_HOLDS_S
    os.utime(kept, (then_s, then_s))
    accel.why_not(KERNEL, 8)
    assert (tmp_path / "tries").read_text().split() == tries * ["once"]


def test_kvm_is_tried_again_after_a_boot(
    device: None, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(accel.QEMU, "echo 'Linux version 6.1'")
    assert not accel.why_not(KERNEL, 8)
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(accel, "_BOOT_ID", tmp_path / "boot_id")
    tool(accel.QEMU, "exit 1")
    assert accel.why_not(KERNEL, 8)


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
    command = boot._vng(Machine(KERNEL, nodes=nodes), Path("/share"))
    given = [after for each, after in pairwise(command) if each == "--numa"]
    assert given[: len(wanted)] == [f"{4096 // nodes}M,cpus={cpus}" for cpus in wanted]
    assert len(given) == (nodes if nodes > 1 else 0)
    assert "--disable-kvm" in command


def test_network_cards(image: None, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a queue for every CPU, where their other ends can be had."""
    machine = Machine(KERNEL, cpus=4)
    assert "ifname=many" not in " ".join(boot._vng(machine, Path("/share")))
    monkeypatch.setattr(cards, "can_wire", lambda: True)
    told = " ".join(boot._vng(machine, Path("/share")))
    assert "ifname=many,script=no,downscript=no,vhost=off,queues=4 " in told


@pytest.mark.parametrize("queues", [1, 2])
def test_tap_has_several_queues_where_the_card_has(
    queues: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qemu cannot open one that is made otherwise than it asks for (tun_set_iff: EINVAL)."""
    monkeypatch.setattr(cards, "can_wire", lambda: True)
    command = cards.wired(["vng"], queues)
    assert command[-2:] == ["wires", "vng"]
    assert ("multi_queue" in command[-3]) == (queues > 1)
    assert ("queues=" in cards.arguments(queues)) == (queues > 1)
    assert ("mq=on" in cards.arguments(queues)) == (queues > 1)


def test_guest_sees_the_tree(image: None) -> None:
    with boot._share(()) as share:
        assert os.access(share / "enter", os.X_OK)
        with tarfile.open(share / "tree.tar") as tar:
            names = set(tar.getnames())
    assert not share.exists()
    assert {"dev", "steer/cli/main.py", "bpf/steer.h", "tests/tools/test_vm.py"} <= names
    assert not any(name.startswith((".git/", ".venv/")) for name in names)


def test_guest_sees_a_policy_and_what_it_includes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may be that of a file of ours."""
    names = ("enter", "lib/x.h", "other/../y.h")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"of {name}")
    monkeypatch.chdir(tmp_path)
    with boot._share([Path(name) for name in names]) as share:
        for name in names:
            assert (share / "policy" / name).read_text() == f"of {name}"
        assert (share / "enter").read_text() == (root.TREE / "vm/guest/enter").read_text()


@pytest.mark.parametrize(
    "policy, included",
    [
        ("p.c", "../x.h"),
        ("p.c", "lib/../../x.h"),
        ("p.c", "{here}/x.h"),
        ("{here}/p.c", "{here}/../x.h"),
        ("{here}/p.c", "/proc/version"),
    ],
)
def test_policy_that_includes_what_the_guest_does_not_see(
    policy: str, included: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.c").touch()
    monkeypatch.chdir(tmp_path)
    policy, included = (each.format(here=tmp_path) for each in (policy, included))
    said = f"share {policy} with the guest: it includes {included}, which is not below its dir"
    with pytest.raises(VmError, match=said), boot._share([Path(policy), Path(included)]):
        pass


@pytest.fixture
def small_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tree = tmp_path / "tree"
    for name in ("steer/good.py", "steer/wrong.py", "tests/test.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("if" if "wrong" in name else "pass")
    monkeypatch.setattr(root, "TREE", tree)
    root._is_guests_python.cache_clear()
    return tree


def test_guest_gets_the_tree_compiled(
    small_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a way that Python takes for that of these very files; ours stay without."""
    monkeypatch.setattr(root, "_PYTHON", sys.version_info[:2])
    root.tree(tmp_path / "tree.tar")
    assert not list(small_tree.rglob("__pycache__"))
    with tarfile.open(tmp_path / "tree.tar") as tar:
        [name] = [name for name in tar.getnames() if name.endswith(".pyc")]
        assert name == f"steer/__pycache__/good.{sys.implementation.cache_tag}.pyc"
        compiled = tar.extractfile(name)
        assert compiled
        [flags, mtime, size] = struct.unpack("<III", compiled.read(16)[4:])
        source = tar.getmember("steer/good.py")
        assert (flags, mtime, size) == (0, int(source.mtime), source.size)


def test_what_another_python_compiles_is_left_out(
    small_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(root, "_PYTHON", (3, 0))
    for _ in range(2):
        root.tree(tmp_path / "tree.tar")
    with tarfile.open(tmp_path / "tree.tar") as tar:
        assert "steer/good.py" in tar.getnames()
        assert not [name for name in tar.getnames() if name.endswith(".pyc")]
    assert capsys.readouterr().err.count("here, 3.0 in the guest") == 1


def test_image_is_made_by_root(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("mmdebstrap", "exit 1")
    monkeypatch.setattr(root.os, "geteuid", lambda: 1000)
    with pytest.raises(VmError, match=r"file system: it takes root; run \./dev vm as root$"):
        root.image()


@pytest.mark.needs("root")
@pytest.mark.parametrize("failing", ["mmdebstrap", "tar2sqfs"])
def test_image_that_cannot_be_made(failing: str, tool: Tool) -> None:
    for name in ("mmdebstrap", "tar2sqfs"):
        tool(name, f"echo {name} says >&2; exit {int(name == failing)}")
    with pytest.raises(VmError, match=rf"file system: {failing} failed$") as caught:
        root.image()
    assert f"{failing} says" in caught.value.detail
    assert not list(cache.directory().glob("making-*"))


@pytest.fixture
def contained() -> None:
    """A VM has a namespace for its processes."""
    if os.geteuid():
        require("userns")


def test_output_and_status_are_the_commands(
    image: None, contained: None, tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    tool(
        "vng",
        f"echo early >&2; {UP}; echo late >&2; echo said; echo '{KERNEL_SAYS}' >&2; {DONE}; exit 3",
    )
    assert boot.run(Machine(KERNEL), ["true"]) == 3
    assert capsys.readouterr() == ("said\n", "vm: 6.1.0-56-amd64, emulated: no KVM here\nlate\n")


def test_marks_that_follow_an_unfinished_line(
    image: None, contained: None, tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's console is the same pipe, and a command need not end its last line."""
    tool(
        "vng",
        """printf '[    1.000000] clocksosteer: up\\nurce\\n' >&2
        printf 'late' >&2; echo 'steer: done' >&2""",
    )
    assert boot.run(Machine(KERNEL), ["true"]) == 0
    assert capsys.readouterr().err.endswith("emulated: no KVM here\nurce\nlate")


def test_standard_error_is_read_to_its_end(
    image: None, contained: None, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where we are interrupted; before it is closed."""
    was_closed = []

    def listen(_: boot._Told, stderr: IO[str]) -> None:
        stderr.read()
        time.sleep(0.1)  # for who does not wait for us
        was_closed.append(stderr.closed)

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(boot._Told, "listen", listen)
    tool("vng", "echo said; exec sleep 60")
    with pytest.raises(KeyboardInterrupt):
        boot.run(Machine(KERNEL), ["true"], heard=interrupted)
    assert was_closed == [False]


def test_guest_whose_kernel_dies(image: None, contained: None, tool: Tool) -> None:
    tool("vng", f"{UP}; echo said; echo '{KERNEL_SAYS}' >&2; exit 255")
    with pytest.raises(VmError, match=r"^run in 6\.1\.0-56-amd64: its kernel died$") as caught:
        boot.run(Machine(KERNEL), ["true"])
    assert caught.value.detail == KERNEL_SAYS


def test_guest_that_does_not_come_up(image: None, contained: None, tool: Tool) -> None:
    tool("vng", "printf '[    1.000000] Kernel panic' >&2; exit 0")
    with pytest.raises(VmError, match=r"^boot 6\.1\.0-56-amd64: it did not come up$") as caught:
        boot.run(Machine(KERNEL), ["true"])
    assert caught.value.detail == "[    1.000000] Kernel panic"


CRASHES = (
    "echo crashed >> {0}/tries; echo '[    2.264118] pci 0000:00:03.0: reg 0x20' >&2; exit 255"
)


def test_qemu_that_crashes_in_the_middle_is_started_once_more(
    image: None, contained: None, tool: Tool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    crashes = CRASHES.format(tmp_path)
    tool("vng", f"[ -e {tmp_path}/tries ] || {{ {crashes}; }}; {UP}; echo said; {DONE}; exit 3")
    assert boot.run(Machine(KERNEL), ["true"]) == 3
    printed = capfd.readouterr()
    assert printed.out == "said\n"
    assert "boot 6.1.0-56-amd64: qemu ended in the middle of it: once more" in printed.err


def test_qemu_that_crashes_always(image: None, contained: None, tool: Tool, tmp_path: Path) -> None:
    tool("vng", CRASHES.format(tmp_path))
    with pytest.raises(VmError, match=r"qemu ended in the middle of it$") as caught:
        boot.run(Machine(KERNEL), ["true"])
    assert "reg 0x20" in caught.value.detail
    assert (tmp_path / "tries").read_text() == "crashed\ncrashed\n"


def test_qemu_that_does_not_start_is_started_once(
    image: None, contained: None, tool: Tool, tmp_path: Path
) -> None:
    tool("vng", f"echo once >> {tmp_path}/tries; echo 'qemu: -bad: invalid option' >&2; exit 1")
    with pytest.raises(VmError, match=r"it did not come up$"):
        boot.run(Machine(KERNEL), ["true"])
    assert (tmp_path / "tries").read_text() == "once\n"


def test_guest_that_hangs(
    image: None, contained: None, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "_UP_S", 0.3)
    tool("vng", "exec sleep 60")
    with pytest.raises(VmError, match=r"the guest was not up within 0\.3 s"):
        boot.run(Machine(KERNEL), ["true"])


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


PROGRAM = path("boots_once")
SIGNALS = pytest.mark.parametrize("number, status", [("INT", 130), ("TERM", 143), ("HUP", 129)])


@pytest.fixture
def end(contained: None, tool: Tool, tmp_path: Path) -> Callable[..., int]:
    """Start the command, end it by a signal once its VM is up, and see that nothing is left."""

    def start_and_end(number: str, *words: str, vng: str, stdin: int) -> int:
        tool(accel.QEMU, "")
        alive = tmp_path / "alive"  # what has it open is
        leaves_its_group = "setsid sleep 300 &"
        script = (f"exec 9>{alive}", leaves_its_group, vng, "echo begun", "exec sleep 300")
        tool("vng", "\n".join(script))
        os.mkfifo(alive)
        with (
            open(os.open(alive, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as guest,
            subprocess.Popen(
                [sys.executable, PROGRAM, *words],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(tmp_path)},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process,
        ):
            assert process.stdout
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.Signals[f"SIG{number}"])
            said = "\n" if number == "INT" else ""  # click's
            assert process.communicate(timeout=DEADLINE_S) == ("", said)
            assert is_ready(guest, DEADLINE_S)
            assert guest.read() == b""
        assert not list(tmp_path.glob("steer-vm-*"))
        return process.returncode

    return start_and_end


@SIGNALS
def test_guest_ends_with_its_command(end: Callable[..., int], number: str, status: int) -> None:
    assert end(number, "--", "true", vng=UP, stdin=subprocess.DEVNULL) == status


@SIGNALS
def test_terminal_after_a_shell_that_was_ended(
    end: Callable[..., int], number: str, status: int
) -> None:
    """What qemu does to it is undone."""
    master, terminal = pty.openpty()
    try:
        modes = termios.tcgetattr(terminal)
        unblock = f"{sys.executable} -c 'import os; os.set_blocking(0, False)'"
        assert end(number, vng=f"stty raw -echo; {unblock}", stdin=terminal) == status
        assert termios.tcgetattr(terminal) == modes
        assert os.get_blocking(terminal)
    finally:
        os.close(master)
        os.close(terminal)


@pytest.mark.needs("bcc")
def test_what_a_policy_includes_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler tells; where there is none here, all headers beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "_compiled", {})
    for name in ("read.h", "not.h"):
        (tmp_path / name).touch()
    policy = tmp_path / "mine.c"
    policy.write_text(
        '#include "steer.h"\n#include "read.h"\nSTEER_POLICY(ctx, table)\n{\n\treturn 0;\n}\n'
    )
    assert list(command._with_headers(policy)) == [policy, tmp_path / "read.h"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(compile, "interpreters", list)
    assert set(command._with_headers(policy)) == {policy, tmp_path / "read.h", tmp_path / "not.h"}
