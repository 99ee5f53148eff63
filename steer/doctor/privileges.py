"""Checks of privileges, and of what limits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from steer import features
from steer.doctor.case import Case, Opinion, known, sysctl
from steer.doctor.facts import Facts, Unknown
from steer.policy.builtin import EBPF
from steer.workers.visibility import BORROW, INSTEAD, WAITS

_GET_CAP_BPF = "run with CAP_BPF: as root, by AmbientCapabilities= in systemd, --cap-add in Docker"
GET_LIBBPF = "install libbpf 1.0 or later (Debian, Ubuntu: libbpf1)"
_GET_EBPF = f"{features.EBPF.cure} with CONFIG_BPF_SYSCALL"
_MEMLOCK_UNTIL = (5, 11)
"""Since Linux 5.11 the memory of maps counts against the memory cgroup, not RLIMIT_MEMLOCK."""


_PURPOSES = {
    "CAP_BPF": "eBPF programs",
    "CAP_NET_BIND_SERVICE": "low ports",
    "CAP_NET_ADMIN": "counting open connections",
    "CAP_PERFMON": "least-conn, and policies with loops",
}


def held(case: Case) -> Iterator[Opinion]:
    held = known(case.facts.capabilities)
    lacking = [f"{name} ({use})" for name, use in _PURPOSES.items() if name not in held]
    capabilities = f"without {', '.join(lacking)}" if lacking else f"with {', '.join(_PURPOSES)}"
    found = f"uid {case.facts.uid} {capabilities}"
    if EBPF in case.wanted and not case.has_cap_bpf:
        yield Opinion("warn", found, _GET_CAP_BPF)
    else:
        yield Opinion("ok", found)


def unprivileged_bpf(case: Case) -> Iterator[Opinion]:
    value = sysctl(case, "kernel.unprivileged_bpf_disabled")
    meaning = {
        0: "any user may load some kinds of program, but not sk_reuseport: that needs CAP_BPF",
        1: "bpf(2) needs CAP_BPF until reboot; sk_reuseport needs it at any setting",
        2: "bpf(2) needs CAP_BPF; sk_reuseport needs it at any setting",
    }
    yield Opinion("ok", f"{value}: {meaning.get(value, 'sk_reuseport needs CAP_BPF')}")


class _Obstacle(NamedTuple):
    """Something that may refuse bpf(2) to a process with CAP_BPF.

    Args:
        name: what to call it; returns "" if this system does not have it.
    """

    name: Callable[[Facts], str]
    cure: str


def _profile(facts: Facts) -> str:
    profile = facts.profile if isinstance(facts.profile, str) else ""
    confines = profile and profile != "kernel" and "unconfined" not in profile
    return f"security profile {profile}" if confines else ""


def _lockdown(facts: Facts) -> str:
    locked = isinstance(facts.lockdown, str) and facts.lockdown != "none"
    return f"kernel lockdown, {facts.lockdown}" if locked else ""


def _memlock(facts: Facts) -> str:
    counts = features.kernel_version(facts.release) < _MEMLOCK_UNTIL
    is_limited = counts and facts.memlock_bytes is not None
    return f"RLIMIT_MEMLOCK of {facts.memlock_bytes} bytes" if is_limited else ""


_OBSTACLES = (
    _Obstacle(
        lambda facts: "a user namespace" if facts.user_namespace is True else "",
        "run outside of it (no rootless container): its root has no CAP_BPF on the machine",
    ),
    _Obstacle(
        lambda facts: "a seccomp filter" if facts.seccomp is True else "",
        "let the filter pass bpf(2) (Docker 23+: --cap-add BPF; systemd: SystemCallFilter=bpf)",
    ),
    _Obstacle(_memlock, "raise it (ulimit -l unlimited; systemd: LimitMEMLOCK=infinity)"),
    _Obstacle(_profile, "allow bpf there; the denial is in `dmesg` or `ausearch -m avc`"),
    _Obstacle(_lockdown, "boot without lockdown: in some distributions it refuses all of bpf(2)"),
)


def confinement(case: Case) -> Iterator[Opinion]:
    found = [(obstacle.name(case.facts), obstacle.cure) for obstacle in _OBSTACLES]
    names = ", ".join(name for name, _ in found if name)
    if names and case.is_refused and case.has_cap_bpf:
        cures = " or ".join(cure for name, cure in found if name)
        yield Opinion("warn", f"{names}: bpf(2) is refused although CAP_BPF is held", cures)
    else:
        yield Opinion("ok", names or "none found")


def ebpf_cure(case: Case) -> str:
    """What would most likely make eBPF work."""
    if isinstance(case.facts.libbpf, Unknown):
        return GET_LIBBPF
    if not case.has_cap_bpf:
        return _GET_CAP_BPF
    if case.is_refused:
        there = (obstacle.cure for obstacle in _OBSTACLES if obstacle.name(case.facts))
        return next(there, "find what refuses bpf(2): container, seccomp or security module")
    return case.probes[EBPF].cure or _GET_EBPF


def ports(case: Case) -> Iterator[Opinion]:
    first_free = sysctl(case, "net.ipv4.ip_unprivileged_port_start")
    low = [bind.label for bind in case.service.binds if bind.port < first_free]
    if not low:
        yield Opinion("ok", f"from {first_free} up, for which no privilege is needed")
    elif "CAP_NET_BIND_SERVICE" in known(case.facts.capabilities):
        yield Opinion("ok", f"{', '.join(low)}: CAP_NET_BIND_SERVICE is held")
    else:
        cure = f"run as root, add CAP_NET_BIND_SERVICE, or choose ports from {first_free} up"
        yield Opinion("fail", f"{', '.join(low)}: CAP_NET_BIND_SERVICE is needed", cure)


def socket_options(case: Case) -> Iterator[Opinion]:
    for error in case.options.refused:
        yield Opinion("fail", f"{error.what}: {error.cause}", error.cure)
    for shortfall in case.options.shortfalls:
        yield Opinion("warn", shortfall.found, shortfall.cure)
    if not any(case.options) and case.service.settings:
        yield Opinion("ok", ", ".join(map(str, case.service.settings)))


def workers(case: Case) -> Iterator[Opinion]:
    found = known(case.access)
    if not (found.look or found.borrow):
        yield Opinion("ok", "steer can see what they wait for and duplicate their sockets")
    refusals = {WAITS: found.look, BORROW: found.borrow}
    for what, refusal in refusals.items():
        if refusal is not None:
            yield Opinion("warn", f"{refusal.found}: {INSTEAD[what]}", refusal.cure)
