"""Boots a kernel with this tree through virtme-ng, and runs a command or a shell in it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vm import accel, cards, root
from vm.cache import say
from vm.errors import VmError
from vm.kernels import Kernel

_UP, _DONE = "steer: up", "steer: done"
"""What vm/guest/enter says."""
_UP_S = 180
"""Emulated on a loaded machine; 15 where nothing else runs."""
_TOOLS = {accel.QEMU: "qemu-system-x86", "vng": "virtme-ng, from PyPI", "unshare": "util-linux"}
_APPEND = "mitigations=off nokaslr audit=0 cryptomgr.notests"
"""Where nobody else is, there is nobody to be guarded against. The tests of the kernel's ciphers
take CPU time at each boot, and on an emulated, busy machine one of them failed with a trace."""
_REQUIRED = "STEER_REQUIRE_KERNEL=1"
"""What the guest lacks then fails its tests, as it would here: tests/conftest.py."""
_KERNEL_SAYS = re.compile(r"\[ *[0-9]+\.[0-9]{6}\] ")
_PANIC = "Kernel panic"
_LAST_LINES = 60


@dataclass(frozen=True)
class Machine:
    """Args: nodes: NUMA nodes, of equally many CPUs each. qemu: further arguments for it."""

    kernel: Kernel
    cpus: int = 8
    nodes: int = 1
    memory_mib: int = 4096
    qemu: str = ""


def run(
    machine: Machine,
    command: Sequence[str],
    files: Sequence[Path] = (),
    heard: Callable[[str], None] | None = None,
) -> int:
    """Boot, run, power off.

    Args:
        files: a policy and what it includes; the guest sees them in /host/policy, as they lie.
        heard: gets the lines that the command prints; else they are printed.

    Returns:
        The command's exit status.

    Raises:
        VmError: the guest did not come up, or its kernel died.
    """
    with _share(files) as share:
        required = [_REQUIRED] if os.environ.get("STEER_REQUIRE_KERNEL") == "1" else []
        script = shlex.join([*required, "/host/enter", *command])
        booting = cards.wired([*_vng(machine, share), "--verbose", "--exec", script], machine.cpus)
        try:
            return _boot(booting, share, heard or _show, machine)
        except _QemuCrashed as error:
            say(f"{error}: once more")
            return _boot(booting, share, heard or _show, machine)


class _QemuCrashed(VmError):
    """Emulating several CPUs, qemu 7.2 may: seen as a segmentation fault in one of some hundred
    boots, while the kernel gave its devices their addresses."""


def _boot(
    booting: Sequence[str], share: Path, heard: Callable[[str], None], machine: Machine
) -> int:
    with subprocess.Popen(
        booting,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(share),
        process_group=0,
        text=True,
        errors="replace",
    ) as vng:
        return _listen(vng, heard, machine)


def shell(machine: Machine) -> int:
    """A shell on this terminal."""
    with _share(()) as share, _terminal_kept():
        booting = [*_vng(machine, share), "--shell", "/host/shell"]
        command = cards.wired(booting, machine.cpus)
        return subprocess.run(command, env=_environment(share), check=False).returncode


@contextmanager
def _terminal_kept() -> Iterator[None]:
    """qemu makes it raw, and where it is killed leaves it so."""
    if not os.isatty(0):
        yield
        return
    modes, is_blocking = termios.tcgetattr(0), os.get_blocking(0)
    try:
        yield
    finally:
        with suppress(OSError, termios.error):  # it may have gone
            os.set_blocking(0, is_blocking)
            termios.tcsetattr(0, termios.TCSANOW, modes)


def _environment(share: Path) -> dict[str, str]:
    """What virtme-ng leaves behind is to go with the share."""
    return {**os.environ, "TMPDIR": str(share)}


@contextmanager
def _share(files: Sequence[Path]) -> Iterator[Path]:
    """What the guest finds in /host."""
    with tempfile.TemporaryDirectory(prefix="steer-vm-") as name:
        share = Path(name)
        _copy_policy(files, share / "policy")
        for path in (root.TREE / "vm" / "guest").iterdir():
            shutil.copy(path, share)
        root.tree(share / "tree.tar")
        yield share


def _copy_policy(files: Sequence[Path], to: Path) -> None:
    for path in files:
        home = files[0].parent
        if not path.is_relative_to(home) or os.path.relpath(path, home).startswith("../"):
            cause = f"it includes {path}, which is not below its directory"
            raise VmError(f"share {files[0]} with the guest", cause, "put it there")
        copy = to / path.relative_to(home)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def _vng(machine: Machine, share: Path) -> Sequence[str]:
    """Its command."""
    kernel = machine.kernel
    _look_for_tools(kernel)
    image = root.image()
    for path in (kernel.image, share, image):
        if shlex.quote(str(path)) != str(path):
            raise VmError(f"boot {kernel.release}", f"virtme-ng cannot take the path {path}")
    command = ["vng", "--run", str(kernel.image)]
    command += ["--root-disk", str(image), "--root-dev", "/dev/vda"]
    command += ["--root-fstype", "squashfs", "--force-9p", "--disable-microvm"]
    command += ["--rodir", f"/host={share}", "--cwd", "/", "--user", "root"]
    command += ["--cpus", str(machine.cpus), "--append", _APPEND]
    command += ["--memory", f"{machine.memory_mib}M", *_nodes(machine)]
    if machine.qemu:
        command += [f"--qemu-opts={machine.qemu}"]
    if cards.can_wire():
        command += [f"--qemu-opts={cards.arguments(machine.cpus)}"]
    return [*command, *_accelerator(machine)]


def _look_for_tools(kernel: Kernel) -> None:
    for tool, package in _TOOLS.items():
        if not shutil.which(tool):
            raise VmError(f"boot {kernel.release}", f"no command {tool}", f"install {package}")


def _nodes(machine: Machine) -> Iterator[str]:
    cpus = machine.cpus // machine.nodes
    for node in range(machine.nodes if machine.nodes > 1 else 0):
        first = node * cpus
        yield "--numa"
        yield f"{machine.memory_mib // machine.nodes}M,cpus={first}-{first + cpus - 1}"


def _accelerator(machine: Machine) -> Sequence[str]:
    """KVM, unless it is said why not."""
    why_not = accel.why_not(machine.kernel, machine.cpus)
    if not why_not:
        return ()
    say(f"{machine.kernel.release}, emulated: {why_not}")
    return ["--disable-kvm"]


def _listen(vng: subprocess.Popen[str], heard: Callable[[str], None], machine: Machine) -> int:
    assert vng.stdout
    assert vng.stderr
    told = _Told()
    errors = threading.Thread(target=told.listen, args=(vng.stderr,))
    limit = threading.Timer(_UP_S, _end_unless, (told.up, vng))
    try:
        errors.start()
        limit.start()
        for line in vng.stdout:
            heard(line)
        status = vng.wait()
    finally:
        limit.cancel()  # or Python waits for it before it ends
        _end(vng)  # or its standard error has no end
        errors.join()
    if not (told.up.is_set() and told.is_done):
        raise _broke_off(told, machine, status)
    return status


def _broke_off(told: _Told, machine: Machine, status: int) -> VmError:
    detail, release = "\n".join(told.last), machine.kernel.release
    if told.up.is_set():
        return VmError(f"run in {release}", "its kernel died", detail=detail)
    if status < 0:
        return VmError(f"boot {release}", f"the guest was not up within {_UP_S} s", detail=detail)
    if any(map(_KERNEL_SAYS.match, told.last)) and _PANIC not in detail:
        return _QemuCrashed(f"boot {release}", "qemu ended in the middle of it", detail=detail)
    return VmError(f"boot {release}", "it did not come up", detail=detail)


class _Told:
    """What comes on standard error: the guest's two marks, what its kernel says, which is kept in
    case it is its last word, and what the command says, which is passed on."""

    def __init__(self) -> None:
        self.up = threading.Event()
        self.is_done = False
        self.last: deque[str] = deque(maxlen=_LAST_LINES)

    def listen(self, stderr: IO[str]) -> None:
        for line in stderr:
            said, mark = _parted(line)
            self._take(said)
            if mark == _UP:
                self.up.set()
            elif mark == _DONE:
                self.is_done = True

    def _take(self, said: str) -> None:
        if self.up.is_set() and not _KERNEL_SAYS.match(said):
            print(said, end="", file=sys.stderr, flush=True)
        elif said:
            self.last.append(said.rstrip())


def _parted(line: str) -> tuple[str, str]:
    """What was said, and the mark that followed it: on the same line where it was not yet ended,
    by the command, or by the kernel, which writes a line in pieces."""
    for mark in (_UP, _DONE):
        if line.rstrip().endswith(mark):
            return line.rstrip().removesuffix(mark), mark
    return line, ""


def _show(line: str) -> None:
    print(line, end="", flush=True)


def _end_unless(up: threading.Event, vng: subprocess.Popen[str]) -> None:
    if not up.is_set():
        _end(vng)


def _end(vng: subprocess.Popen[str]) -> None:
    """With all that it has started, qemu among it."""
    if vng.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(vng.pid, signal.SIGKILL)
