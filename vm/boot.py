"""Boots a kernel with this tree through virtme-ng, and runs a command or a shell in it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vm import accel, cards, root
from vm.cache import say
from vm.errors import VmError
from vm.kernels import Kernel

_UP = "steer: up"
_UP_S = 180
"""Emulated on a loaded machine; 15 where nothing else runs."""
_APPEND = "mitigations=off nokaslr audit=0"
"""Where nobody else is, there is nobody to be guarded against."""


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
        files: seen by the guest in /host, by their names.
        heard: gets the lines that the command prints; else they are printed.

    Returns:
        The command's exit status.

    Raises:
        VmError: the guest did not come up.
    """
    with _share(files) as share:
        script = shlex.join(["/host/enter", *command])
        with subprocess.Popen(
            cards.wired([*_vng(machine, share), "--exec", script]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(share),
            process_group=0,
            text=True,
            errors="replace",
        ) as vng:
            try:
                return _listen(vng, heard or _show, machine)
            finally:
                _end(vng)


def shell(machine: Machine) -> int:
    """A shell on this terminal."""
    with _share(()) as share:
        command = cards.wired([*_vng(machine, share), "--shell", "/host/shell"])
        return subprocess.run(command, env=_environment(share), check=False).returncode


def _environment(share: Path) -> dict[str, str]:
    """What virtme-ng leaves behind is to go with the share."""
    return {**os.environ, "TMPDIR": str(share)}


@contextmanager
def _share(files: Sequence[Path]) -> Iterator[Path]:
    """What the guest finds in /host."""
    with tempfile.TemporaryDirectory(prefix="steer-vm-") as name:
        share = Path(name)
        root.tree(share / "tree.tar")
        for path in (*(root.TREE / "vm" / "guest").iterdir(), *files):
            shutil.copy(path, share)
        yield share


def _vng(machine: Machine, share: Path) -> Sequence[str]:
    kernel = machine.kernel
    if not shutil.which(accel.QEMU):
        raise VmError("boot", f"no {accel.QEMU}", "install qemu-system-x86")
    command = ["vng", "--run", str(kernel.image)]
    command += ["--root-disk", str(root.image()), "--root-dev", "/dev/vda"]
    command += ["--root-fstype", "squashfs", "--force-9p", "--disable-microvm"]
    command += ["--rodir", f"/host={share}", "--cwd", "/", "--user", "root"]
    command += ["--cpus", str(machine.cpus), "--append", _APPEND]
    command += ["--memory", f"{machine.memory_mib}M", *_nodes(machine)]
    if machine.qemu:
        command += [f"--qemu-opts={machine.qemu}"]
    if cards.can_wire():
        command += [f"--qemu-opts={cards.arguments(machine.cpus)}"]
    if why_not := accel.why_not(kernel, machine.cpus):
        say(f"{kernel.release}, emulated: {why_not}")
        command += ["--disable-kvm"]
    return command


def _nodes(machine: Machine) -> Iterator[str]:
    cpus = machine.cpus // machine.nodes
    for node in range(machine.nodes if machine.nodes > 1 else 0):
        first = node * cpus
        yield "--numa"
        yield f"{machine.memory_mib // machine.nodes}M,cpus={first}-{first + cpus - 1}"


def _listen(vng: subprocess.Popen[str], heard: Callable[[str], None], machine: Machine) -> int:
    assert vng.stdout
    assert vng.stderr
    up = threading.Event()
    said: list[str] = []
    errors = threading.Thread(target=_watch, args=(vng.stderr, up, said))
    errors.start()
    limit = threading.Timer(_UP_S, _end_unless, (up, vng))
    limit.start()
    for line in vng.stdout:
        heard(line)
    status = vng.wait()
    limit.cancel()
    errors.join()
    if not up.is_set():
        cause = f"the guest was not up within {_UP_S} s" if status < 0 else "it did not come up"
        raise VmError(f"boot {machine.kernel.release}", cause, detail="".join(said[-20:]))
    return status


def _watch(stderr: IO[str], up: threading.Event, said: list[str]) -> None:
    for line in stderr:
        if line.strip() == _UP:
            up.set()
        elif up.is_set():
            print(line, end="", file=sys.stderr, flush=True)
        else:
            said.append(line)


def _show(line: str) -> None:
    print(line, end="", flush=True)


def _end_unless(up: threading.Event, vng: subprocess.Popen[str]) -> None:
    if not up.is_set():
        _end(vng)


def _end(vng: subprocess.Popen[str]) -> None:
    """virtme-ng, and qemu, which it has for a grandchild."""
    with suppress(ProcessLookupError):
        os.killpg(vng.pid, signal.SIGKILL)
