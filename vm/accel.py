"""Whether KVM can be used. A device that is there may still refuse, or hang, in a nested VM."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path

from vm import cache
from vm.kernels import Kernel

QEMU = "qemu-system-x86_64"
_LIMIT_S = 15
_NO_HOLDS_S = 3600
"""It may be due to what passes, such as memory that others had."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def why_not(kernel: Kernel, cpus: int) -> str:
    """Why KVM cannot be used here, or nothing. The answer is kept: a yes for this boot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no /dev/kvm that may be used"
    name = hashlib.sha256(f"{kernel.image} {cpus}".encode()).hexdigest()[:12]
    kept = cache.directory("kvm-answers") / name
    state = kernel.image.stat()
    asked = f"{_BOOT_ID.read_text().strip()} {state.st_mtime_ns} {state.st_size}"
    answer = _known(kept, asked)
    if answer is None:
        answer = _try(kernel, cpus)
        kept.write_text(f"{asked}\n{answer}")
    return answer


def _known(kept: Path, asked: str) -> str | None:
    """The answer that was kept, while it holds."""
    if not kept.exists():
        return None
    first, _, answer = kept.read_text().partition("\n")
    is_fresh = not answer or time.time() - kept.stat().st_mtime < _NO_HOLDS_S
    return answer if first == asked and is_fresh else None


def _try(kernel: Kernel, cpus: int) -> str:
    """Let the kernel come up, find no root and reboot, which ends qemu: a second where all is
    well. `-cpu host` as virtme-ng has it."""
    command = [QEMU, "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-smp", str(cpus)]
    command += ["-m", "512", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"]
    command += ["-kernel", str(kernel.image), "-append", "console=ttyS0 panic=-1"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a kernel is not up under KVM within {_LIMIT_S} s"
    if done.returncode or "Linux version" not in done.stdout:
        said = [line for line in done.stderr.splitlines() if "error" in line or "ssert" in line]
        return (said or ["KVM does not come up"])[0].removeprefix(f"{QEMU}: error: ")
    return ""
