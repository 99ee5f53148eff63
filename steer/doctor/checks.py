"""What this machine can do for a service, what is missing, and how to get it.

First all is looked at, then judged: a check is a pure function from a `Case` to what
it has to say, and CHECKS is all of them. One that does not apply says nothing.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import msgspec

from steer import anchor, auto, cpus, features, ladder, policies, visibility
from steer import plan as planning
from steer.backends import open_whole
from steer.config import Service
from steer.counting import Counting
from steer.cpus import cpus_named
from steer.doctor import facts as kernel_facts
from steer.doctor.facts import Facts, Unknown
from steer.errors import BindError, KernelError, SteerError, Uncounted, VerifierError
from steer.kernel import probe, sockopt, topology
from steer.kernel.access import Access
from steer.kernel.nic import Interface, cpus_taking_packets
from steer.ladder import Answer
from steer.plan import Plan
from steer.policy import BACKENDS, CBPF, EBPF, KERNEL, Policy
from steer.steering import DATAGRAMS_LOST, STILL_CHOSEN
from steer.values import plural
from steer.visibility import BORROW, INSTEAD, WAITS

T = TypeVar("T")
Verdict = Literal["ok", "warn", "fail", "unknown"]
RUN, MIGRATE, COUNT = "run", "migrate", "count"


class Finding(msgspec.Struct, frozen=True):
    """What one check has to say.

    Args:
        topic: a key of CHECKS; one topic may have several findings.
        verdict: "warn": the service runs, with less than there could be; "fail": it
            would not start, or not as asked; "unknown": could not be looked at.
        cure: what would help; "" only if all is well.
    """

    topic: str
    verdict: Verdict
    found: str
    cure: str


class Opinion(NamedTuple):
    """A finding without its topic."""

    verdict: Verdict
    found: str
    cure: str = ""


class Probed(ladder.Finding, frozen=True):
    """What a probe found, with the cure apart from the reason."""

    cure: str = ""


class Options(NamedTuple):
    """How the kernel takes the service's socket options.

    Args:
        refused: by it, each with why.
        shortfalls: taken, but will not do.
    """

    refused: Sequence[BindError]
    shortfalls: Sequence[str]


_NO_OPTIONS = Options((), ())
_ALL_ACCESS = Access()


@dataclass(frozen=True)
class Case:
    """All there is to judge.

    Args:
        probes: by backend, RUN, MIGRATE and COUNT.
        plan: as if without --strict, with what `auto` becomes; Unknown where even the CPUs
            could not be read.
        options: not looked at if not given.
        access: to workers, from outside.
    """

    service: Service
    facts: Facts
    probes: Mapping[str, Probed]
    plan: Plan | Unknown
    options: Options = _NO_OPTIONS
    access: Access | Unknown = _ALL_ACCESS

    @property
    def policy(self) -> Policy:
        return self._last if isinstance(self.plan, Unknown) else self.plan.policy

    @property
    def _last(self) -> Policy:
        """Of the policies to try the one that stands on the most backends."""
        asked = policies.find(self.service.policy)
        return asked.candidates[-1] if asked.candidates else asked

    @property
    def wanted(self) -> Sequence[str]:
        """The backends that this service may stand on."""
        asked = self.service.backend
        first = 0 if asked == "auto" else BACKENDS.index(asked)
        return tuple(each for each in BACKENDS[first:] if each in self._last.backends)

    @property
    def is_steered(self) -> bool:
        return self.wanted != (KERNEL,)

    @property
    def has_tcp(self) -> bool:
        return any(bind.protocol == "tcp" for bind in self.service.binds)

    @property
    def has_cap_bpf(self) -> bool:
        """CAP_SYS_ADMIN has it in it (capabilities(7)). What cannot be read is not held lacking."""
        held = self.facts.capabilities
        return isinstance(held, Unknown) or not held.isdisjoint({"CAP_BPF", "CAP_SYS_ADMIN"})

    @property
    def is_refused(self) -> bool:
        """Whether eBPF is not permitted, rather than not there."""
        found = self.probes[EBPF]
        return found.answer is Answer.NO and not found.cure and _ERRNO_REFUSED in found.reason


_ERRNO_REFUSED = "EPERM"


class _CouldNotTell(Exception):
    def __init__(self, reason: str, cure: str) -> None:
        self.opinion = Opinion("unknown", reason, cure)


Check = Callable[[Case], Iterable[Opinion]]


def examine(service: Service) -> list[Finding]:
    """Everything there is to say about running `service` here. Changes nothing."""
    return judge(look(service))


def judge(case: Case) -> list[Finding]:
    """The findings of all checks, in their order. Pure."""
    return [
        Finding(topic, *opinion)
        for topic, check in CHECKS.items()
        for opinion in _opinions(check, case)
    ]


def _opinions(check: Check, case: Case) -> Sequence[Opinion]:
    try:
        return tuple(check(case))
    except _CouldNotTell as error:
        return (error.opinion,)


# ---- look


def look(service: Service) -> Case:
    """Ask the system, and try in the small what `run` would do."""
    asked = {
        RUN: probe.run,
        EBPF: probe.ebpf,
        CBPF: probe.cbpf,
        MIGRATE: probe.migrate,
        COUNT: _can_count,
    }
    probes = {name: _probed(ask) for name, ask in asked.items()}
    plan = _try_out(service, probes)
    found = kernel_facts.read(os.environ, service.control_socket)
    options = Options(
        tuple(sockopt.refused(service.binds, service.settings)),
        tuple(sockopt.shortfalls(service.binds, service.settings)),
    )
    return Case(service, found, probes, plan, options, _access(service))


def _access(service: Service) -> Access | Unknown:
    try:
        return visibility.of(service)
    except SteerError as error:
        return Unknown(str(error))
    except OSError as error:
        return Unknown(f"try with a process: {error.strerror or error}")


def _can_count() -> ladder.Finding:
    """Whether the kernel counts open connections for us."""
    try:
        with closing(Counting(1)) as counting:
            answer = Answer.NO if counting.why_not else Answer.YES
            return ladder.Finding(answer, counting.why_not)
    except KernelError as error:
        return ladder.Finding(Answer.NO, str(error))


def _probed(ask: Callable[[], ladder.Finding]) -> Probed:
    try:
        found = ask()
    except OSError as error:
        return Probed(Answer.UNKNOWN, error.strerror or str(error))
    reason, _, cure = found.reason.partition("; ")
    # Of the many causes that a refusal can have, we look for the one.
    return Probed(found.answer, reason, "" if _ERRNO_REFUSED in reason else cure)


def _try_out(service: Service, probes: dict[str, Probed]) -> Plan | Unknown:
    """The plan whose first rung takes the policy itself; what does not is noted in `probes`."""
    plan = _plan(service, probes)
    while not isinstance(plan, Unknown):
        backend = plan.rungs[0].backend
        refusal = _refusal(plan)
        if refusal is None:
            break
        if plan.others:
            following, *rest = plan.others
            plan = plan.choosing_by([auto.because(following, refusal.reason), *rest])
        else:
            probes[backend] = refusal
            plan = _plan(service, probes)
    return plan


def _plan(service: Service, probes: Mapping[str, Probed]) -> Plan | Unknown:
    lenient = msgspec.structs.replace(service, strict=False)
    try:
        return planning.plan(lenient, topology.read(), probes, policies.find(service.policy))
    except SteerError as error:
        return Unknown(f"{error.what}: {error.cause}")
    except (OSError, ValueError) as error:
        return Unknown(f"read the CPUs: {error}")


def _refusal(plan: Plan) -> Probed | None:
    whose = f"{plan.policy.name}: " if plan.others else ""
    try:
        open_whole(plan).close()
    except Uncounted as error:
        return Probed(Answer.NO, str(error))
    except VerifierError as error:
        return Probed(Answer.NO, f"{whose}{error.what}: {error.cause}", error.cure or _REPORT)
    except KernelError as error:
        cure = "" if error.cause == _ERRNO_REFUSED else error.cure
        return Probed(Answer.NO, f"{whose}{error.what}: {error.cause}", cure)
    except OSError as error:
        # A no though it tells little: what is unknown would be tried again, for ever.
        return Probed(Answer.NO, f"{whose}try {plan.rungs[0].backend}: {error.strerror or error}")
    return None


# ---- what checks have in common

_MOUNT_SYSFS = "mount sysfs on /sys"
_LOOK = "ask as root, in the machine's own network namespace, with /proc and /sys mounted"


def _known(value: T | Unknown, cure: str = _LOOK) -> T:
    if isinstance(value, Unknown):
        raise _CouldNotTell(value.reason, cure)
    return value


def _sysctl(case: Case, name: str) -> int:
    value = case.facts.sysctls[name]
    if isinstance(value, Unknown):
        raise _CouldNotTell(f"{name}: {value.reason}", _LOOK)
    return value


# ---- privileges, and what limits them

_GET_CAP_BPF = "run with CAP_BPF: as root, by AmbientCapabilities= in systemd, --cap-add in Docker"
_GET_LIBBPF = "install libbpf 1.0 or later (Debian, Ubuntu: libbpf1)"
_GET_EBPF = f"{features.EBPF.cure} with CONFIG_BPF_SYSCALL"
_GET_CBPF = features.RUN.cure
_REPORT = "report it with the verifier's words, which `steer run` shows"
_GET_BCC = "for policies of your own install bcc (Debian, Ubuntu: python3-bpfcc)"
_MEMLOCK_UNTIL = (5, 11)
"""From then on memory of maps counts against the memory cgroup."""

_PURPOSES = {
    "CAP_BPF": "eBPF programs",
    "CAP_NET_BIND_SERVICE": "low ports",
    "CAP_NET_ADMIN": "counting open connections",
    "CAP_PERFMON": "least-conn, and policies with loops",
}


def _privileges(case: Case) -> Iterator[Opinion]:
    held = _known(case.facts.capabilities)
    lacking = [f"{name} ({use})" for name, use in _PURPOSES.items() if name not in held]
    capabilities = f"without {', '.join(lacking)}" if lacking else f"with {', '.join(_PURPOSES)}"
    found = f"uid {case.facts.uid} {capabilities}"
    if EBPF in case.wanted and not case.has_cap_bpf:
        yield Opinion("warn", found, _GET_CAP_BPF)
    else:
        yield Opinion("ok", found)


def _unprivileged_bpf(case: Case) -> Iterator[Opinion]:
    value = _sysctl(case, "kernel.unprivileged_bpf_disabled")
    meaning = {
        0: "any user may load some kinds of program, but not sk_reuseport: that needs CAP_BPF",
        1: "until reboot, bpf(2) needs CAP_BPF; so it does for sk_reuseport whatever this says",
        2: "bpf(2) needs CAP_BPF; so it does for sk_reuseport whatever this says",
    }
    yield Opinion("ok", f"{value}: {meaning.get(value, 'sk_reuseport needs CAP_BPF')}")


class _Obstacle(NamedTuple):
    """Something that refuses bpf(2) to one who holds CAP_BPF; its name is "" where it is not."""

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
    _Obstacle(_lockdown, "boot without lockdown: some distributions' refuses all of bpf(2)"),
)


def _confinement(case: Case) -> Iterator[Opinion]:
    found = [(obstacle.name(case.facts), obstacle.cure) for obstacle in _OBSTACLES]
    names = ", ".join(name for name, _ in found if name)
    if names and case.is_refused and case.has_cap_bpf:
        cures = " or ".join(cure for name, cure in found if name)
        yield Opinion("warn", f"{names}: bpf(2) is refused although CAP_BPF is held", cures)
    else:
        yield Opinion("ok", names or "none found")


def _ebpf_cure(case: Case) -> str:
    """What would most likely bring eBPF about."""
    if isinstance(case.facts.libbpf, Unknown):
        return _GET_LIBBPF
    if not case.has_cap_bpf:
        return _GET_CAP_BPF
    if case.is_refused:
        there = (obstacle.cure for obstacle in _OBSTACLES if obstacle.name(case.facts))
        return next(there, "find what refuses bpf(2): container, seccomp or security module")
    return case.probes[EBPF].cure or _GET_EBPF


def _ports(case: Case) -> Iterator[Opinion]:
    first_free = _sysctl(case, "net.ipv4.ip_unprivileged_port_start")
    low = [bind.label for bind in case.service.binds if bind.port < first_free]
    if not low:
        yield Opinion("ok", f"from {first_free} up, for which no privilege is needed")
    elif "CAP_NET_BIND_SERVICE" in _known(case.facts.capabilities):
        yield Opinion("ok", f"{', '.join(low)}: CAP_NET_BIND_SERVICE is held")
    else:
        cure = f"run as root, add CAP_NET_BIND_SERVICE, or choose ports from {first_free} up"
        yield Opinion("fail", f"{', '.join(low)}: CAP_NET_BIND_SERVICE is needed", cure)


def _socket_options(case: Case) -> Iterator[Opinion]:
    for error in case.options.refused:
        yield Opinion("fail", f"{error.what}: {error.cause}", error.cure)
    for shortfall in case.options.shortfalls:
        found, _, cure = shortfall.partition("; ")
        yield Opinion("warn", found, cure)
    if not any(case.options) and case.service.settings:
        yield Opinion("ok", ", ".join(map(str, case.service.settings)))


# ---- the ladder


def _kernel(case: Case) -> Iterator[Opinion]:
    here, found = f"Linux {case.facts.release} on {case.facts.machine}", case.probes[RUN]
    if found.answer is Answer.NO:
        yield Opinion("fail", f"{here}: {found.reason}", found.cure or probe.LET_PASS)
    elif found.answer is Answer.UNKNOWN:
        yield Opinion("unknown", f"{here}: could not tell: {found.reason}", "ask again")
    else:
        yield Opinion("ok", f"{here}{_lacking(case.facts.release)}")


def _lacking(release: str) -> str:
    """What later kernels give; nothing where the version is not to be read out of `release`."""
    version = features.kernel_version(release)
    later = [each for each in features.FEATURES if (0, 0) < version < each.since]
    return "".join(f"; {each.version} is needed {each.gives}" for each in later)


def _rung(case: Case, backend: str, works: str, cure: str) -> Opinion:
    found = case.probes[backend]
    if found.answer is Answer.YES:
        return Opinion("ok", f"yes: {works}")
    told = f"{found.answer.value}: {found.reason}"
    if backend not in case.wanted:
        return Opinion("ok", f"{told} (this service does not ask for it)")
    if found.answer is Answer.NO:
        return Opinion("warn", told, cure)
    return Opinion("unknown", told, found.cure or "ask again")


def _ebpf(case: Case) -> Iterator[Opinion]:
    yield _rung(case, EBPF, "programs and their maps load and attach", _ebpf_cure(case))


def _cbpf(case: Case) -> Iterator[Opinion]:
    cure = case.probes[CBPF].cure or _GET_CBPF
    yield _rung(case, CBPF, "classic programs attach; no privilege is needed", cure)


def _migration(case: Case) -> Iterator[Opinion]:
    """The ladder knows nothing of it: it comes with eBPF or does not."""
    if not case.has_tcp or EBPF not in case.wanted:
        return
    is_there = case.probes[EBPF].answer is Answer.YES
    cure = features.MIGRATE.cure if is_there else _ebpf_cure(case)
    words = "a program says where a closing worker's queue goes"
    yield _opinion(case.probes[MIGRATE], words, cure)


def _counting(case: Case) -> Iterator[Opinion]:
    """Without it least-conn has to do with less, and status shows none."""
    if not case.has_tcp or EBPF not in case.wanted:
        return
    found = case.probes[COUNT]
    words = "open connections are counted by worker"
    yield _opinion(found, words, found.cure or _COUNT_CURE)


def _opinion(found: Probed, words: str, cure: str) -> Opinion:
    """What a probe found, in `words` if it is a yes."""
    if found.answer is Answer.YES:
        return Opinion("ok", f"yes: {words}")
    if found.answer is Answer.NO:
        return Opinion("warn", f"no: {found.reason}", cure)
    return Opinion("unknown", f"could not tell: {found.reason}", found.cure or "ask again")


_COUNT_CURE = "give CAP_BPF and CAP_NET_ADMIN, and mount cgroup2 where it can be read"


def _policy(case: Case) -> Iterator[Opinion]:
    """What `auto` becomes. That it is not by load is less than there could be, unless it is by
    the kind of traffic or by the backend that was asked for."""
    plan = _known(case.plan, _MOUNT_SYSFS)
    if not plan.became:
        return
    as_it_should_be = plan.policy_reason in (auto.COUNTED, auto.DATAGRAMS)
    if as_it_should_be or case.service.backend not in ("auto", EBPF):
        yield Opinion("ok", plan.became)
    else:
        yield Opinion("warn", plan.became, _count_cure(case))


def _count_cure(case: Case) -> str:
    """What would have `auto` go by load."""
    if case.probes[EBPF].answer is not Answer.YES:
        return _ebpf_cure(case)
    counting = case.probes[COUNT]
    if counting.answer is not Answer.YES:
        return counting.cure or _COUNT_CURE
    return "give CAP_PERFMON too: without it the verifier takes no program that compares workers"


def _backend(case: Case) -> Iterator[Opinion]:
    rung = _known(case.plan, _MOUNT_SYSFS).rungs[0]
    found = f"{rung.backend}; {rung.reason}" if rung.reason else rung.backend
    if not rung.fallback:
        yield Opinion("ok", found)
    elif case.service.strict:
        yield Opinion("fail", f"{found}, and --strict", f"{_climb(case)}, or drop --strict")
    else:
        yield Opinion("warn", found, _climb(case))


def _draining(case: Case) -> Iterator[Opinion]:
    rung = _known(case.plan, _MOUNT_SYSFS).rungs[0]
    cure = f"choose a policy and a backend that leave workers out: {EBPF} or {CBPF}"
    if rung.backend == KERNEL:
        yield Opinion("warn", STILL_CHOSEN, _climb(case) if rung.fallback else cure)
    else:
        yield Opinion("ok", "a worker that is to end gets nothing new, and ends when it is done")
    if any(bind.protocol == "udp" for bind in case.service.binds):
        yield Opinion("ok", DATAGRAMS_LOST)
    if rung.backend == KERNEL:
        for note in anchor.notes(case.service.binds, {}):
            found, _, cure = note.rpartition("; ")
            yield Opinion("warn", found, cure)


def _climb(case: Case) -> str:
    """How to get to what was asked for."""
    asked = case.service.backend
    if asked not in ("auto", *case.policy.backends):
        return f"choose --backend auto, or a policy that runs on {asked} (see `steer policies`)"
    is_classic = asked == CBPF
    return (case.probes[CBPF].cure or _GET_CBPF) if is_classic else _ebpf_cure(case)


# ---- what is installed


def _libbpf(case: Case) -> Iterator[Opinion]:
    found = case.facts.libbpf
    if isinstance(found, str):
        yield Opinion("ok", found)
    else:
        needed = EBPF in case.wanted
        yield Opinion("warn" if needed else "ok", found.reason, _GET_LIBBPF if needed else "")


def _bcc(case: Case) -> Iterator[Opinion]:
    found = _known(case.facts.bcc, _GET_BCC)
    if found is None:
        yield Opinion("ok", "not here, and not needed: built-in policies are prebuilt", _GET_BCC)
    else:
        yield Opinion("ok", f"{found.version}, seen by {found.python}")


# ---- the machine's settings


def _jit(case: Case) -> Iterator[Opinion]:
    if not case.is_steered:
        return
    value = _sysctl(case, "net.core.bpf_jit_enable")
    cure = "sysctl -w net.core.bpf_jit_enable=1"
    if value == 0:
        yield Opinion("warn", "0: programs are interpreted, so each choice costs more", cure)
    elif value == 2:
        yield Opinion("warn", "2: all code is written to the kernel's log, for debugging", cure)
    else:
        yield Opinion("ok", f"{value}: programs are compiled to machine code")


def _syncookies(case: Case) -> Iterator[Opinion]:
    if not case.has_tcp:
        return
    value = _sysctl(case, "net.ipv4.tcp_syncookies")
    cure = "sysctl -w net.ipv4.tcp_syncookies=1"
    if value == 0:
        yield Opinion("warn", "0: a SYN flood fills the queues, and connections fail", cure)
    elif value == 2:
        yield Opinion("warn", "2: each connection is chosen for twice, at its SYN and ACK", cure)
    else:
        yield Opinion("ok", f"{value}: only while a queue overflows")


def _somaxconn(case: Case) -> Iterator[Opinion]:
    if not case.has_tcp:
        return
    most, backlog = _sysctl(case, "net.core.somaxconn"), case.service.backlog
    if backlog > most:
        cure = f"sysctl -w net.core.somaxconn={backlog}, or --backlog {most}"
        yield Opinion("warn", f"{most}: the backlog, {backlog}, is cut down to it", cure)
    else:
        yield Opinion("ok", f"{most}: room for the backlog, {backlog}")


def _migrate_req(case: Case) -> Iterator[Opinion]:
    """The program migrates whatever this says; without one the kernel does, if this is 1."""
    if not case.has_tcp:
        return
    value = case.facts.sysctls["net.ipv4.tcp_migrate_req"]
    shown = f"could not be read ({value.reason})" if isinstance(value, Unknown) else value
    on_ebpf = _known(case.plan, _MOUNT_SYSFS).rungs[0].backend == EBPF
    if features.kernel_version(case.facts.release) < features.MIGRATE.since:
        lost = f"{shown}, for nothing: connections that wait in a closing worker's queue are reset"
        yield Opinion("warn", lost, features.MIGRATE.cure)
    elif on_ebpf and case.probes[MIGRATE].answer is Answer.YES:
        yield Opinion("ok", f"{shown}: the program migrates whatever this says")
    elif isinstance(value, Unknown):
        lost = f"{value.reason}: what waits in a closing worker's queue may be reset"
        yield Opinion("unknown", lost, _LOOK)
    elif value == 0:
        lost = "0: connections that wait in a closing worker's queue are reset"
        yield Opinion("warn", lost, "sysctl -w net.ipv4.tcp_migrate_req=1, or steer by eBPF")
    else:
        yield Opinion("ok", f"{value}: a closing worker's queue goes to another by hash")


def _files(case: Case) -> Iterator[Opinion]:
    soft, hard = case.facts.files
    needed = _known(case.plan, _MOUNT_SYSFS).descriptors
    if hard is not None and hard < needed:
        cure = f"raise it (ulimit -Hn {needed}; systemd: LimitNOFILE={needed}), or fewer workers"
        yield Opinion("fail", f"hard limit {hard}, and {needed} are needed", cure)
    elif soft is not None and soft < needed:
        yield Opinion("ok", f"{needed} needed: the soft limit, {soft}, will be raised")
    else:
        yield Opinion("ok", f"{needed} needed, {'no limit' if soft is None else f'limit {soft}'}")


def _places(case: Case) -> Iterator[Opinion]:
    places = case.facts.places
    obstacles = [f"{place.directory}: {place.obstacle}" for place in places if place.obstacle]
    usable = [str(place.directory) for place in places if not place.obstacle]
    if usable:
        yield Opinion("ok", "; ".join([usable[0], *obstacles]))
    else:
        yield Opinion("fail", "; ".join(obstacles), "name another place: --control-socket PATH")


# ---- workers, from outside


def _workers(case: Case) -> Iterator[Opinion]:
    found = _known(case.access)
    if not (found.look or found.borrow):
        yield Opinion("ok", "what they wait for is seen, and their sockets can be borrowed")
    refusals = {WAITS: found.look, BORROW: found.borrow}
    for what, refusal in refusals.items():
        if refusal is not None:
            yield Opinion("warn", f"{refusal.cause}: {INSTEAD[what]}", refusal.cure)


# ---- CPUs and packets


def _cpus(case: Case) -> Iterator[Opinion]:
    if isinstance(case.plan, Unknown):
        yield Opinion("fail", case.plan.reason, _MOUNT_SYSFS)
        return
    allowed, workers = case.plan.topology.allowed, len(case.plan.seats)
    found = f"{plural(workers, 'worker')} on {cpus_named(allowed)}"
    quota = case.facts.cpu_quota
    if isinstance(quota, float) and workers > quota:
        cure = f"--workers {max(1, int(quota))}, or raise the cgroup's cpu.max"
        yield Opinion("warn", f"{found}, in a cgroup that may use {quota:g} at a time", cure)
    else:
        yield Opinion("ok", found)


def _receive_queues(case: Case) -> Iterator[Opinion]:
    """Interface by interface, those that have a say in which worker is chosen."""
    if not (case.policy.pinned and case.is_steered):
        return
    plan = _known(case.plan, _MOUNT_SYSFS)
    interfaces = _known(case.facts.interfaces)
    yield from _loopback(interfaces)
    if all(_is_loopback(bind.address) for bind in case.service.binds):
        return
    outer = [each for each in interfaces if each.name != "lo"]
    silent = [each for each in outer if each.note]
    told = [each for each in outer if not each.note]
    yield from (_spread(each, plan) for each in told)
    if silent:
        yield _silence(silent, is_decided=bool(told), mask=cpumask(_manned(plan)))


def _loopback(interfaces: Iterable[Interface]) -> Iterator[Opinion]:
    if any(each.name == "lo" and each.note for each in interfaces):
        yield Opinion("ok", "lo: same-host clients land on the worker of their own CPU")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _silence(silent: Iterable[Interface], is_decided: bool, mask: str) -> Opinion:
    """Of interfaces that take what others bring in: of those, a card is told of by itself."""
    notes: dict[str, list[str]] = {}
    for each in silent:
        notes.setdefault(each.note, []).append(each.name)
    found = "; ".join(f"{', '.join(names)}: {note}" for note, names in notes.items())
    if is_decided:
        return Opinion("ok", found)
    names = [name for group in notes.values() for name in group]
    return Opinion("unknown", found, f"look on the host, or {_steer_packets(names[0], mask)}")


def _spread(interface: Interface, plan: Plan) -> Opinion:
    """Whether every worker gets packets of this interface, and on its own CPU."""
    manned = _manned(plan)
    cure = _spreading(interface, manned)
    taking = cpus_taking_packets(interface)
    if taking is None:
        return Opinion("unknown", f"{interface.name}: its interrupts cannot be told", cure)
    home = cpus.nearest(manned, plan.topology)
    idle = manned - {home[cpu] for cpu in taking if cpu in home}
    found = f"{interface.name}: packets come in on {cpus_named(sorted(taking))}"
    if idle:
        return Opinion("warn", f"{found}; workers on {cpus_named(sorted(idle))} get none", cure)
    if taking.isdisjoint(manned):
        return Opinion("warn", f"{found}, where no worker is", cure)
    return Opinion("ok", f"{found}, some for every worker")


def _manned(plan: Plan) -> frozenset[int]:
    return frozenset(seat.cpu for seat in plan.seats if seat.cpu is not None)


def _spreading(interface: Interface, manned: frozenset[int]) -> str:
    """More queues where there may be more; else their interrupts; else packets themselves."""
    by_software = _steer_packets(interface.name, cpumask(manned))
    if interface.driver is None or interface.channels is None:
        return by_software
    if interface.channels >= len(manned):
        return f"start irqbalance, or set /proc/irq/*/smp_affinity_list; else {by_software}"
    return f"ethtool -L {interface.name} combined {len(manned)}; else {by_software}"


def _steer_packets(name: str, mask: str) -> str:
    return f"echo {mask} | tee /sys/class/net/{name}/queues/rx-*/rps_cpus"


def cpumask(numbers: Iterable[int]) -> str:
    """CPUs in the kernel's mask format, the reverse of `topology.parse_cpumask`."""
    digits = f"{sum(1 << cpu for cpu in set(numbers)):x}"
    groups = [digits[max(0, end - 8) : end] for end in range(len(digits), 0, -8)]
    return ",".join(reversed(groups))


CHECKS: Mapping[str, Check] = {
    "kernel": _kernel,
    "cpus": _cpus,
    "privileges": _privileges,
    "unprivileged-bpf": _unprivileged_bpf,
    "confinement": _confinement,
    "libbpf": _libbpf,
    "bcc": _bcc,
    "ebpf": _ebpf,
    "migration": _migration,
    "counting": _counting,
    "cbpf": _cbpf,
    "jit": _jit,
    "ports": _ports,
    "socket-options": _socket_options,
    "somaxconn": _somaxconn,
    "syncookies": _syncookies,
    "tcp-migrate-req": _migrate_req,
    "files": _files,
    "run-directory": _places,
    "workers": _workers,
    "receive-queues": _receive_queues,
    "draining": _draining,
    "policy": _policy,
    "backend": _backend,
}
"""By topic, in the order they are told. The topics are what scripts look for: keep them."""
