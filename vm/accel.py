"""Whether KVM can be used. A device that is there may still refuse, or hang, in a nested VM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vm import cache
from vm.kernels import Kernel

QEMU = "qemu-system-x86_64"
_LIMIT_S = 15
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def why_not(kernel: Kernel, cpus: int) -> str:
    """Why KVM cannot be used here, or nothing. The last answer is kept for this boot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no /dev/kvm that may be used"
    known = cache.directory() / "kvm"
    state = kernel.image.stat()
    made = f"{kernel.image} {state.st_mtime_ns} {state.st_size}"
    asked = f"{_BOOT_ID.read_text().strip()} {made} {cpus}"
    if known.exists():
        first, _, rest = known.read_text().partition("\n")
        if first == asked:
            return rest
    found = _try(kernel, cpus)
    known.write_text(f"{asked}\n{found}")
    return found


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
