"""Reads facts about the system and about what this process may do. Judges none of them.

`read` does not raise: a fact that cannot be read is `Unknown`, with the reason.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from steer.control import rundir
from steer.errors import SteerError, errno_name
from steer.linux import nic
from steer.linux.nic import Interface
from steer.loader import compile, libbpf

T = TypeVar("T")

CAPABILITIES = {
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
"""The bits of the capabilities that steer can use (include/uapi/linux/capability.h)."""

SYSCTLS = (
    "kernel.unprivileged_bpf_disabled",
    "net.core.bpf_jit_enable",
    "net.core.somaxconn",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_migrate_req",
    "net.ipv4.tcp_syncookies",
)

_FIRST_USER_NAMESPACE = "user:[4026531837]"
"""PROC_USER_INIT_INO of include/linux/proc_ns.h."""
_ASK_BCC = "import bcc; bcc.BPF.dump_func; print(bcc.__version__)"
"""The package bcc on PyPI is another project and has no dump_func."""
_ASK_BCC_S = 30.0


@dataclass(frozen=True)
class Unknown:
    """A value that could not be read, and the reason."""

    reason: str


@dataclass(frozen=True)
class Compiler:
    """The version of a bcc, and the Python that can import it."""

    version: str
    python: str


@dataclass(frozen=True)
class Place:
    """A directory for control sockets.

    Args:
        obstacle: why no socket can be made in it; "" if one can.
    """

    directory: Path
    obstacle: str


@dataclass(frozen=True)
class Facts:
    """Facts about the system and this process.

    Args:
        uid: the effective user ID.
        capabilities: the names in CAPABILITIES that are effective.
        user_namespace: whether the process is in a user namespace other than the first.
        seccomp: whether system calls are filtered.
        lockdown: the kernel's mode: "none", "integrity" or "confidentiality".
        profile: the profile by which a security module confines this process.
        cpu_quota: how many CPUs' time the cgroup may use; None: no limit.
        memlock_bytes: RLIMIT_MEMLOCK; None: no limit.
        files: RLIMIT_NOFILE, soft and hard; None: no limit.
        libbpf: the version of libbpf.
        bcc: None if no Python has bcc.
        places: where a control socket may be made, best first.
        interfaces: the network interfaces that are not down.
    """

    release: str
    machine: str
    uid: int
    capabilities: frozenset[str] | Unknown
    user_namespace: bool | Unknown
    seccomp: bool | Unknown
    lockdown: str | Unknown
    profile: str | Unknown
    sysctls: Mapping[str, int | Unknown]
    cpu_quota: float | Unknown | None
    memlock_bytes: int | None
    files: tuple[int | None, int | None]
    libbpf: str | Unknown
    bcc: Compiler | Unknown | None
    places: tuple[Place, ...]
    interfaces: tuple[Interface, ...] | Unknown


def read(
    environment: Mapping[str, str],
    control_socket: str | None = None,
    sysfs: str = "/sys",
    procfs: str = "/proc",
) -> Facts:
    """Read everything. Looking for bcc takes a child process and up to half a second.

    Args:
        control_socket: the configured path of the control socket; None: not configured.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Facts(
        release=os.uname().release,
        machine=os.uname().machine,
        uid=os.geteuid(),
        capabilities=_attempt(lambda: _capabilities(procfs)),
        user_namespace=_attempt(lambda: _user_namespace(procfs)),
        seccomp=_attempt(lambda: int(_status(procfs, "Seccomp")) > 0),
        lockdown=_attempt(lambda: _lockdown(sysfs)),
        profile=_attempt(lambda: _text(f"{procfs}/self/attr/current").rstrip("\0\n")),
        sysctls={name: _sysctl(procfs, name) for name in SYSCTLS},
        cpu_quota=_attempt(lambda: _cpu_quota(sysfs, procfs)),
        memlock_bytes=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        files=(_limit(soft), _limit(hard)),
        libbpf=_attempt(libbpf.version),
        bcc=_attempt(_bcc),
        places=_places(environment, control_socket),
        interfaces=_attempt(lambda: _interfaces(sysfs, procfs)),
    )


def _attempt(look: Callable[[], T]) -> T | Unknown:
    try:
        return look()
    except OSError as error:
        name = errno_name(error)
        return Unknown(f"{error.filename}: {name}" if error.filename else name)
    except (SteerError, ImportError, ValueError, subprocess.SubprocessError) as error:
        return Unknown(str(error))


def _text(path: str) -> str:
    return Path(path).read_text()


def _status(procfs: str, field: str) -> str:
    """One line of /proc/self/status (proc_pid_status(5))."""
    path = f"{procfs}/self/status"
    match = re.search(rf"^{field}:\s*(\S+)", _text(path), re.MULTILINE)
    if match is None:
        raise ValueError(f"no {field} in {path}")
    return match[1]


def _capabilities(procfs: str) -> frozenset[str]:
    held = int(_status(procfs, "CapEff"), 16)
    return frozenset(name for name, bit in CAPABILITIES.items() if held >> bit & 1)


def _user_namespace(procfs: str) -> bool:
    return os.readlink(f"{procfs}/self/ns/user") != _FIRST_USER_NAMESPACE


def _lockdown(sysfs: str) -> str:
    """The mode in force. The file has it in brackets: "none [integrity] confidentiality"
    (kernel_lockdown(7))."""
    path = f"{sysfs}/kernel/security/lockdown"
    match = re.search(r"\[(\w+)\]", _text(path))
    if match is None:
        raise ValueError(f"no mode in {path}")
    return match[1]


def _sysctl(procfs: str, name: str) -> int | Unknown:
    try:
        text = _text(f"{procfs}/sys/{name.replace('.', '/')}")
    except OSError as error:
        return Unknown(errno_name(error))
    try:
        return int(text)
    except ValueError:
        return Unknown(repr(text))


def _cpu_quota(sysfs: str, procfs: str) -> float | None:
    """The smallest cpu.max of our cgroup and its ancestors: "150000 100000" is 1.5 CPUs
    (Documentation/admin-guide/cgroup-v2.rst). Version 1 of cgroups has no such file."""
    match = re.search(r"^0::/(.*)$", _text(f"{procfs}/self/cgroup"), re.MULTILINE)
    if match is None:
        raise ValueError("no cgroup of version 2")
    own = Path(match[1])
    files = (Path(sysfs, "fs/cgroup", group, "cpu.max") for group in (own, *own.parents))
    limits = [file.read_text().split() for file in files if file.exists()]
    return min((int(most) / int(period) for most, period in limits if most != "max"), default=None)


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _bcc() -> Compiler | None:
    for python in compile.interpreters():
        done = subprocess.run(
            [python, "-I", "-c", _ASK_BCC],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_ASK_BCC_S,
        )
        if done.returncode == 0:
            return Compiler(done.stdout.strip(), python)
    return None


def _places(environment: Mapping[str, str], control_socket: str | None) -> tuple[Place, ...]:
    if control_socket is not None:
        directory = Path(control_socket).absolute().parent
        return (Place(directory, _write_obstacle(directory)),)
    directories = rundir.directories(environment)
    return tuple(Place(directory, _socket_obstacle(directory)) for directory in directories)


def _socket_obstacle(directory: Path) -> str:
    """Why a `claim.Claim` could not make a socket in the directory; "" if it could."""
    try:
        owner = directory.lstat().st_uid
    except FileNotFoundError:
        return _write_obstacle(directory.parent)
    except OSError as error:
        return errno_name(error)
    return _write_obstacle(directory) if owner == os.geteuid() else "another user owns it"


def _write_obstacle(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory"
    return "" if os.access(directory, os.W_OK | os.X_OK, effective_ids=True) else "not writable"


def _interfaces(sysfs: str, procfs: str) -> tuple[Interface, ...]:
    found = nic.receive_queues(sysfs, procfs)
    return tuple(each for each in found if not _is_down(sysfs, each.name))


def _is_down(sysfs: str, name: str) -> bool:
    try:
        return _text(f"{sysfs}/class/net/{name}/operstate").strip() == "down"
    except OSError:
        return False
