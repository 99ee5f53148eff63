"""What the doctor says of machines that are not here."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer import abi, features
from steer.config import planning
from steer.config.service import Service
from steer.doctor import checks
from steer.doctor import facts as kernel_facts
from steer.doctor import look as looking
from steer.doctor.case import COUNT, MIGRATE, RUN, Case, Finding
from steer.doctor.checks import CHECKS
from steer.doctor.facts import CAPABILITIES, SYSCTLS, Facts, Place, Unknown
from steer.doctor.packets import cpumask
from steer.errors import KernelError, Note
from steer.features import Answer
from steer.linux.nic import Interface
from steer.linux.topology import parse_cpumask
from steer.loader import bpf_maps, probe, programs
from steer.policy.builtin import CBPF, EBPF
from steer.policy.cpus import Topology
from steer.workers.access import Access
from testkit.confine import NOBODY
from testkit.sound_machine import (
    AUTO,
    CARD,
    FOUR,
    GOOD,
    LO,
    NO_BPF,
    PROBES,
    REFUSED,
    SERVICE,
)


@pytest.fixture(autouse=True)
def no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for it takes a process."""
    monkeypatch.setattr(kernel_facts, "_bcc", lambda: None)


# ---- a machine where all is well, and what may be otherwise

NOTHING = replace(
    GOOD,
    capabilities=Unknown("EACCES"),
    user_namespace=Unknown("ENOENT"),
    seccomp=Unknown("ENOENT"),
    lockdown=Unknown("ENOENT"),
    profile=Unknown("EINVAL"),
    sysctls={name: Unknown("ENOENT") for name in SYSCTLS},
    cpu_quota=Unknown("no cgroup of version 2"),
    libbpf=Unknown("load libbpf.so.1: not found"),
    bcc=Unknown("timed out"),
    places=(Place(Path("/run/steer"), "not writable"),),
    interfaces=Unknown("EPERM"),
)

ALL_ACCESS = Access()


def a_case(
    service: Service = SERVICE,
    facts: Facts = GOOD,
    probes: Mapping[str, features.Finding] = PROBES,
    topology: Topology = FOUR,
    access: Access | Unknown = ALL_ACCESS,
) -> Case:
    probes = {**PROBES, **probes}
    return Case(service, facts, probes, planning.plan(service, topology, probes), access=access)


def serving(**keys: Any) -> Service:
    return Service(**{"bind": ("0.0.0.0:8080",), "policy": "cpu", **keys})


def sysctl(name: str, value: int | Unknown) -> Facts:
    return replace(GOOD, sysctls={**GOOD.sysctls, name: value})


def without(*names: str) -> Facts:
    return replace(GOOD, uid=1000, capabilities=frozenset(CAPABILITIES) - set(names))


def told(topic: str, case: Case) -> list[Finding]:
    return [each for each in checks.judge(case) if each.topic == topic]


def one(topic: str, case: Case) -> Finding:
    (found,) = told(topic, case)
    return found


# ---- all checks together


def test_all_is_well() -> None:
    by_cpu, by_auto = checks.judge(a_case()), checks.judge(a_case(AUTO))
    assert {each.verdict for each in (*by_cpu, *by_auto)} == {"ok"}
    told = {each.topic for each in (*by_cpu, *by_auto)}
    assert [topic for topic in CHECKS if topic in told] == list(CHECKS)
    assert [each.found for each in by_auto if each.topic == "policy"] == [
        "auto is least-conn, as open connections are counted"
    ]


@pytest.mark.parametrize(
    "service, probes, verdict, reason, cure",
    [
        (AUTO, NO_BPF, "warn", "least-conn needs ebpf", "run with CAP_BPF"),
        (msgspec.structs.replace(AUTO, backend="cbpf"), {}, "ok", "least-conn needs ebpf", ""),
        (msgspec.structs.replace(AUTO, bind=("udp://:1",)), {}, "ok", planning.DATAGRAMS, ""),
    ],
)
def test_what_auto_becomes_and_what_would_have_it_go_by_load(
    service: Service, probes: dict[str, features.Finding], verdict: str, reason: str, cure: str
) -> None:
    facts = without("CAP_BPF", "CAP_SYS_ADMIN") if probes else GOOD
    found = {each.topic: each for each in checks.judge(a_case(service, facts, probes))}["policy"]
    assert (found.verdict, found.found) == (verdict, f"auto is hash, as {reason}")
    assert found.cure.startswith(cure)


def test_topics_that_scripts_look_for() -> None:
    assert list(CHECKS) == [
        *("kernel", "cpus", "privileges", "unprivileged-bpf", "confinement", "libbpf", "bcc"),
        *("ebpf", "migration", "counting", "cbpf", "jit", "ports", "socket-options", "somaxconn"),
        *("syncookies", "tcp-migrate-req", "files", "run-directory", "workers"),
        *("receive-queues", "draining", "spares"),
        *("policy", "backend"),
    ]


SERVICES = [
    SERVICE,
    serving(bind=("127.0.0.1:80",), backend="cbpf"),
    serving(bind=("udp://[::]:53",), policy="random"),
    serving(policy="round-robin", backend="cbpf", backlog=65535),
    serving(policy="kernel", workers=1024),
]
ODD_FACTS = [
    GOOD,
    NOTHING,
    without(*CAPABILITIES),
    replace(GOOD, release="odd", memlock_bytes=65536, files=(64, 64), bcc=None, interfaces=()),
    replace(NOTHING, user_namespace=True, seccomp=True, lockdown="integrity", profile="x"),
]
ODD_PROBES: list[dict[str, features.Finding]] = [
    {},
    NO_BPF,
    dict.fromkeys(PROBES, features.Finding(Answer.NO, "EINVAL")),
    dict.fromkeys(PROBES, features.Finding(Answer.UNKNOWN, "EMFILE")),
]


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("facts", ODD_FACTS)
@pytest.mark.parametrize("probes", ODD_PROBES)
@pytest.mark.parametrize("planned", [True, False])
def test_whatever_is_not_well_has_a_cure(
    service: Service, facts: Facts, probes: dict[str, features.Finding], planned: bool
) -> None:
    case = a_case(service, facts, probes)
    if not planned:
        case = replace(case, plan=Unknown("read /sys/devices/system/cpu/possible: ENOENT"))
    for finding in checks.judge(case):
        assert finding.found
        assert "\n" not in finding.found
        assert "None" not in finding.found + finding.cure
        assert finding.cure or finding.verdict == "ok"


def test_what_cannot_be_read_is_unknown_and_says_why() -> None:
    found = {each.topic: each for each in checks.judge(a_case(facts=NOTHING))}
    assert found["privileges"].verdict == "unknown"
    assert found["privileges"].found == "EACCES"
    assert found["somaxconn"].verdict == "unknown"
    assert found["somaxconn"].found == "net.core.somaxconn: ENOENT"
    assert found["receive-queues"].verdict == "unknown"
    assert found["confinement"].verdict == "ok"


# ---- one by one

ROUND_ROBIN = serving(policy="round-robin")
HALF = features.Finding(
    Answer.UNKNOWN, "create BPF map steer_table: ENOMEM", "raise RLIMIT_MEMLOCK"
)
OLD = features.Finding(Answer.NO, "Linux 5.10.0 cannot migrate connections")


@pytest.mark.parametrize(
    "topic, case, verdict, found, cure",
    [
        ("kernel", a_case(), "ok", "Linux 6.1.0 on x86_64", ""),
        ("cpus", a_case(), "ok", "4 workers on CPUs 0-3", ""),
        ("cpus", a_case(facts=replace(GOOD, cpu_quota=4.0)), "ok", "4 workers", ""),
        (
            *("cpus", a_case(facts=replace(GOOD, cpu_quota=1.5)), "warn"),
            *("the cgroup may use only 1.5 CPUs' time", "--workers 1,"),
        ),
        ("privileges", a_case(), "ok", "uid 0 with CAP_BPF, CAP_NET_BIND_SERVICE", ""),
        ("privileges", a_case(facts=without("CAP_PERFMON")), "ok", "CAP_PERFMON (least-conn", ""),
        (
            *("privileges", a_case(facts=without("CAP_BPF", "CAP_SYS_ADMIN"))),
            *("warn", "uid 1000 without CAP_BPF (eBPF programs)", "AmbientCapabilities="),
        ),
        ("privileges", a_case(facts=without("CAP_BPF")), "ok", "without CAP_BPF", ""),
        (
            *("privileges", a_case(serving(policy="kernel"), without(*CAPABILITIES))),
            *("ok", "without CAP_BPF", ""),
        ),
        *(
            (
                *("unprivileged-bpf", a_case(facts=sysctl(SYSCTLS[0], value))),
                *("ok", f"{value}: ", ""),
            )
            for value in (0, 1, 2, 3)
        ),
        ("libbpf", a_case(), "ok", "1.1", ""),
        (
            *("libbpf", a_case(facts=replace(GOOD, libbpf=Unknown("not found")))),
            *("warn", "not found", "libbpf1"),
        ),
        ("bcc", a_case(), "ok", "0.26.0, importable by /usr/bin/python3", ""),
        ("bcc", a_case(facts=replace(GOOD, bcc=None)), "ok", "not needed", "python3-bpfcc"),
        ("ebpf", a_case(), "ok", "yes: ", ""),
        ("ebpf", a_case(probes=NO_BPF), "warn", "no: create BPF map", "find what refuses bpf(2)"),
        ("ebpf", a_case(probes={EBPF: HALF}), "unknown", "ENOMEM", "raise RLIMIT_MEMLOCK"),
        ("ebpf", a_case(serving(policy="kernel"), probes=NO_BPF), "ok", "not ask for it", ""),
        ("ebpf", a_case(serving(backend="cbpf"), probes=NO_BPF), "ok", "not ask for it", ""),
        (
            *("ebpf", a_case(probes={EBPF: features.Finding(Answer.NO, "load: EINVAL")})),
            *("warn", "no: load: EINVAL", "Linux 5.5"),
        ),
        ("migration", a_case(probes={MIGRATE: OLD}), "warn", "no: Linux 5.10.0", "Linux 5.14"),
        ("migration", a_case(probes={MIGRATE: HALF}), "unknown", "could not tell", "RLIMIT"),
        ("counting", a_case(probes={COUNT: REFUSED}), "warn", "no: create BPF", "CAP_NET_ADMIN"),
        ("counting", a_case(probes={COUNT: HALF}), "unknown", "could not tell", "RLIMIT"),
        ("cbpf", a_case(), "ok", "no privilege", ""),
        (
            "cbpf",
            a_case(probes={CBPF: features.Finding(Answer.NO, "x")}),
            "warn",
            "no: x",
            "Linux 5.4",
        ),
        ("cbpf", a_case(ROUND_ROBIN, probes={CBPF: OLD}), "ok", "not ask for it", ""),
        ("jit", a_case(), "ok", "1: ", ""),
        ("jit", a_case(facts=sysctl("net.core.bpf_jit_enable", 0)), "warn", "0: ", "enable=1"),
        ("jit", a_case(facts=sysctl("net.core.bpf_jit_enable", 2)), "warn", "2: ", "enable=1"),
        ("ports", a_case(), "ok", "from 1024 up", ""),
        ("ports", a_case(serving(bind=(":80",))), "ok", "tcp 0.0.0.0:80: ", ""),
        (
            *("ports", a_case(serving(bind=(":80", "udp://:53", ":99")), without(*CAPABILITIES))),
            *("fail", "tcp 0.0.0.0:80, udp 0.0.0.0:53, tcp 0.0.0.0:99: ", "from 1024 up"),
        ),
        ("somaxconn", a_case(), "ok", "4096: allows the backlog, 2048", ""),
        ("somaxconn", a_case(serving(backlog=4096)), "ok", "4096: allows", ""),
        (
            *("somaxconn", a_case(facts=sysctl("net.core.somaxconn", 128))),
            *(
                "warn",
                "128: the kernel reduces the backlog, 2048",
                "net.core.somaxconn=2048, or --backlog 128",
            ),
        ),
        ("syncookies", a_case(), "ok", "1: ", ""),
        *(
            (
                *("syncookies", a_case(facts=sysctl("net.ipv4.tcp_syncookies", value))),
                *("warn", f"{value}: ", "sysctl -w net.ipv4.tcp_syncookies=1"),
            )
            for value in (0, 2)
        ),
        ("tcp-migrate-req", a_case(), "ok", "0: no effect, as the program migrates", ""),
        (
            *("tcp-migrate-req", a_case(serving(backend="cbpf"))),
            *("warn", "0: connections that wait", "sysctl -w net.ipv4.tcp_migrate_req=1"),
        ),
        (
            *("tcp-migrate-req", a_case(serving(policy="kernel"), sysctl(SYSCTLS[4], 1))),
            *("ok", "1: the kernel moves a closing worker's queue to another", ""),
        ),
        (
            *("tcp-migrate-req", a_case(SERVICE, sysctl(SYSCTLS[4], Unknown("ENOENT")), NO_BPF)),
            *("unknown", "ENOENT: connections in a closing", "with /proc and /sys mounted"),
        ),
        (
            *("tcp-migrate-req", a_case(facts=sysctl(SYSCTLS[4], Unknown("ENOENT")))),
            *("ok", "could not be read (ENOENT): no effect, as the program migrates", ""),
        ),
        (
            *("tcp-migrate-req", a_case(facts=replace(GOOD, release="5.10.0-46-amd64"))),
            *("warn", "0: this kernel resets connections that wait", "use Linux 5.14"),
        ),
        ("files", a_case(), "ok", "needed, limit 1024", ""),
        ("files", a_case(facts=replace(GOOD, files=(None, None))), "ok", "no limit", ""),
        ("files", a_case(facts=replace(GOOD, files=(232, 232))), "ok", "needed, limit 232", ""),
        (
            "files",
            a_case(facts=replace(GOOD, files=(64, None))),
            "ok",
            "steer will raise the soft limit, 64",
            "",
        ),
        (
            *("files", a_case(facts=replace(GOOD, files=(64, 64)))),
            *("fail", "232 needed, but the hard limit is 64", "ulimit -Hn 232"),
        ),
        ("run-directory", a_case(), "ok", "/run/steer", ""),
        ("run-directory", a_case(facts=NOTHING), "fail", "not writable", "--control-socket"),
        ("draining", a_case(), "ok", "gets no new connections", ""),
        (
            *("draining", a_case(serving(policy="kernel"))),
            *("warn", "gets connections until it closes its socket", "ebpf or cbpf"),
        ),
        (
            *("draining", a_case(serving(policy="round-robin", backend="cbpf"))),
            *("warn", "gets connections until", "a policy that runs on cbpf"),
        ),
        ("spares", a_case(), "ok", "0: a worker that fails is missing until another has", ""),
        ("spares", a_case(), "ok", "--spares 1 would have a ready one take its place", ""),
        ("spares", a_case(serving(spares=2)), "ok", "2: ready to take the places of", ""),
        ("spares", a_case(serving(policy="kernel")), "ok", "0: the kernel's hash would", ""),
        (
            *("spares", a_case(serving(policy="kernel", spares=1))),
            *("warn", "no spares are started: the kernel's hash", "ebpf or cbpf"),
        ),
        (
            *("spares", a_case(serving(policy="round-robin", backend="cbpf", spares=1))),
            *("warn", "no spares are started", "a policy that runs on cbpf"),
        ),
        ("backend", a_case(), "ok", "ebpf", ""),
        ("backend", a_case(serving(policy="kernel")), "ok", "kernel", ""),
        ("backend", a_case(serving(backend="cbpf")), "ok", "cbpf; backend = cbpf", ""),
        (
            *("backend", a_case(SERVICE, without(*CAPABILITIES), NO_BPF)),
            *("warn", "cbpf; ebpf: create BPF map", "run with CAP_BPF"),
        ),
        (
            *("backend", a_case(ROUND_ROBIN, without(*CAPABILITIES), NO_BPF)),
            *("warn", "cannot take turns", "run with CAP_BPF"),
        ),
        (
            *("backend", a_case(serving(policy="round-robin", backend="cbpf"))),
            *("warn", "kernel; backend = cbpf; cbpf: ", "a policy that runs on cbpf"),
        ),
        (
            *("backend", a_case(serving(backend="cbpf"), probes={CBPF: OLD})),
            *("warn", "kernel; backend = cbpf; cbpf: ", "Linux 5.4"),
        ),
    ],
)
def test_check(topic: str, case: Case, verdict: str, found: str, cure: str) -> None:
    finding = one(topic, case)
    assert (finding.verdict, found in finding.found) == (verdict, True), finding
    assert cure in finding.cure if cure else finding.cure == ""


def test_strict_turns_a_fallback_into_a_failure() -> None:
    case = replace(a_case(probes=NO_BPF), service=serving(strict=True))
    finding = one("backend", case)
    assert finding.verdict == "fail"
    assert finding.found.endswith("EPERM, and --strict")
    assert finding.cure.endswith(", or drop --strict")


@pytest.mark.parametrize("topic", ["somaxconn", "syncookies", "tcp-migrate-req", "migration"])
def test_udp_has_no_queue_of_connections(topic: str) -> None:
    assert told(topic, a_case(serving(bind=("udp://:53",)))) == []


def test_udp_has_a_queue_that_cannot_be_moved() -> None:
    _, datagrams = told("draining", a_case(serving(bind=("udp://[::]:53",))))
    assert (datagrams.verdict, datagrams.found.split(" queued")[0]) == ("ok", "datagrams")


def test_the_kernels_own_hash_needs_no_compiled_code() -> None:
    assert told("jit", a_case(serving(backend="kernel"))) == []


def test_first_place_that_can_be_written_is_taken() -> None:
    places = (Place(Path("/run/steer"), "not writable"), Place(Path("/tmp/steer-7"), ""))
    finding = one("run-directory", a_case(facts=replace(GOOD, places=places)))
    assert finding.verdict == "ok"
    assert finding.found == "/tmp/steer-7; /run/steer: not writable"


# ---- why eBPF is refused to root


@pytest.mark.parametrize(
    "keys, name, cure",
    [
        ({"user_namespace": True}, "a user namespace", "run outside of it"),
        ({"seccomp": True}, "a seccomp filter", "let the filter pass bpf(2)"),
        ({"lockdown": "integrity"}, "kernel lockdown, integrity", "boot without lockdown"),
        ({"profile": "docker-default (enforce)"}, "profile docker-default", "allow bpf there"),
        ({"release": "5.10.0-9", "memlock_bytes": 65536}, "65536 bytes", "ulimit -l unlimited"),
    ],
)
def test_what_refuses_bpf_to_root(keys: dict[str, Any], name: str, cure: str) -> None:
    facts = replace(GOOD, **keys)
    finding = one("confinement", a_case(facts=facts, probes=NO_BPF))
    assert finding.verdict == "warn"
    assert name in finding.found
    assert cure in finding.cure
    assert cure in one("ebpf", a_case(facts=facts, probes=NO_BPF)).cure
    assert one("confinement", a_case(facts=facts)).verdict == "ok"


def test_several_that_may_refuse_are_all_named() -> None:
    facts = replace(GOOD, user_namespace=True, seccomp=True)
    finding = one("confinement", a_case(facts=facts, probes=NO_BPF))
    assert finding.found.startswith("a user namespace, a seccomp filter: ")
    assert " or let the filter" in finding.cure


@pytest.mark.parametrize("release", ["5.11.0", "6.1.0-18-amd64"])
def test_memory_of_maps_is_no_longer_limited_by_memlock(release: str) -> None:
    facts = replace(GOOD, release=release, memlock_bytes=65536)
    assert one("confinement", a_case(facts=facts, probes=NO_BPF)).found == "none found"


def test_a_missing_capability_comes_before_confinement() -> None:
    facts = replace(without(*CAPABILITIES), seccomp=True)
    case = a_case(facts=facts, probes=NO_BPF)
    assert one("confinement", case).verdict == "ok"
    assert "CAP_BPF" in one("ebpf", case).cure


def test_missing_libbpf_comes_before_all() -> None:
    facts = replace(without(*CAPABILITIES), libbpf=Unknown("not found"))
    assert "libbpf1" in one("ebpf", a_case(facts=facts, probes=NO_BPF)).cure


def test_cure_of_a_refused_policy_is_kept() -> None:
    probed = features.Finding(Answer.NO, "load program steer_cpu: EACCES", "report it")
    assert one("ebpf", a_case(probes={EBPF: probed})).cure == "report it"


# ---- receive queues

VETH = Interface("veth0", None, 2, (), ((),), "no interrupts of its own")
ALL_CPUS = "echo f | tee /sys/class/net/eth0/queues/rx-*/rps_cpus"


def queues(*interfaces: Interface, **keys: Any) -> list[tuple[str, str, str]]:
    found = told("receive-queues", a_case(serving(**keys), replace(GOOD, interfaces=interfaces)))
    return [(each.verdict, each.found, each.cure) for each in found]


def card(**keys: Any) -> Interface:
    return replace(CARD, **keys)


@pytest.mark.parametrize(
    "interface, workers, verdict, found, cure",
    [
        (card(), 4, "ok", "eth0: packets come in on CPUs 0-3; every worker gets some", ""),
        (
            *(card(channels=1, irq_cpus=(1,)), 4, "warn"),
            "eth0: packets come in on CPU 1; workers on CPUs 0,2-3 get none",
            f"ethtool -L eth0 combined 4; else {ALL_CPUS}",
        ),
        (
            *(card(irq_cpus=(0, 1)), 4, "warn"),
            "eth0: packets come in on CPUs 0-1; workers on CPUs 2-3 get none",
            f"start irqbalance, or set /proc/irq/*/smp_affinity_list; else {ALL_CPUS}",
        ),
        (card(channels=None, irq_cpus=(2,)), 4, "warn", "CPU 2; workers on CPUs 0-1,3", ALL_CPUS),
        (card(irq_cpus=(1,), rps=((0, 1, 2, 3),)), 4, "ok", "CPUs 0-3", ""),
        (
            card(irq_cpus=()),
            4,
            "unknown",
            "eth0: the CPUs of its interrupts are not known",
            ALL_CPUS,
        ),
        (card(irq_cpus=(0, 1)), 2, "ok", "CPUs 0-1; every worker gets some", ""),
        (card(irq_cpus=(2, 3)), 2, "warn", "CPUs 2-3, where no worker is", "irqbalance"),
        (card(irq_cpus=(1,)), 1, "warn", "CPU 1, where no worker is", "echo 1 | tee"),
        (card(irq_cpus=(0, 7)), 1, "ok", "CPUs 0,7; every worker gets some", ""),
    ],
)
def test_spread_of_a_card(
    interface: Interface, workers: int, verdict: str, found: str, cure: str
) -> None:
    note, spread = queues(LO, interface, workers=workers)
    assert note == ("ok", "lo: clients on this host get the worker of the CPU that they run on", "")
    assert (spread[0], found in spread[1]) == (verdict, True), spread
    assert cure in spread[2] if cure else spread[2] == ""


def test_each_card_is_told_of() -> None:
    found = queues(LO, CARD, card(name="eth1", channels=1, irq_cpus=(0,)))
    assert [verdict for verdict, _, _ in found] == ["ok", "ok", "warn"]
    assert "ethtool -L eth1" in found[2][2]


def test_virtual_interfaces_are_told_of_together() -> None:
    found = queues(LO, VETH, CARD, replace(VETH, name="br0"))
    assert found[-1] == ("ok", "veth0, br0: no interrupts of its own", "")


def test_in_a_container_the_card_is_not_seen() -> None:
    verdict, _, cure = queues(LO, VETH)[-1]
    assert verdict == "unknown"
    assert cure == "look on the host, or echo f | tee /sys/class/net/veth0/queues/rx-*/rps_cpus"


def test_services_for_the_same_host_do_not_ask_cards() -> None:
    alone = card(channels=1, irq_cpus=(0,))
    assert len(queues(LO, alone, bind=("127.0.0.1:80", "[::1]:80"))) == 1
    assert len(queues(LO, alone, bind=("127.0.0.1:80", "192.0.2.1:80"))) == 2


@pytest.mark.parametrize("keys", [{"policy": "hash"}, {"backend": "kernel"}])
def test_queues_matter_to_no_other_policy(keys: dict[str, Any]) -> None:
    assert queues(LO, CARD, **keys) == []


def test_loopback_that_is_steered_needs_no_note() -> None:
    assert queues(replace(LO, rps=((0, 1),), note=""), bind=("127.0.0.1:80",)) == []


@pytest.mark.parametrize(
    "numbers, mask",
    [((0,), "1"), ((0, 1, 3), "b"), ((32,), "1,00000000"), ((0, 31, 64), "1,00000000,80000001")],
)
def test_masks_as_the_kernel_writes_them(numbers: tuple[int, ...], mask: str) -> None:
    assert cpumask(numbers) == mask


@given(st.sets(st.integers(0, 300)))
def test_masks_can_be_read_back(numbers: set[int]) -> None:
    assert set(parse_cpumask(cpumask(numbers))) == numbers


# ---- facts, as the system tells them


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(at: Path, control_socket: str | None = None) -> Facts:
    return kernel_facts.read({}, control_socket, str(at / "sys"), str(at / "proc"))


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    facts = read(tmp_path)
    may_be_unknown = {each.name for each in fields(Facts) if "Unknown" in str(each.type)}
    found = {name for name in may_be_unknown if isinstance(getattr(facts, name), Unknown)}
    assert found == may_be_unknown - {"sysctls", "libbpf", "bcc", "interfaces"}
    assert dict(facts.sysctls) == dict.fromkeys(SYSCTLS, Unknown("ENOENT"))
    assert facts.capabilities == Unknown(f"{tmp_path}/proc/self/status: ENOENT")


def test_capabilities_and_seccomp(tmp_path: Path) -> None:
    text = "Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t0000008000000400\nSeccomp:\t2\n"
    write(tmp_path / "proc/self/status", text)
    facts = read(tmp_path)
    assert facts.capabilities == frozenset({"CAP_NET_BIND_SERVICE", "CAP_BPF"})
    assert facts.seccomp is True


def test_status_without_a_field(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/status", "Name:\tx\n")
    assert read(tmp_path).seccomp == Unknown(f"no Seccomp in {tmp_path}/proc/self/status")


@pytest.mark.parametrize("number, inside", [(4026531837, False), (4026532600, True)])
def test_user_namespace(tmp_path: Path, number: int, inside: bool) -> None:
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/user").symlink_to(f"user:[{number}]")
    assert read(tmp_path).user_namespace is inside


def test_lockdown_and_profile(tmp_path: Path) -> None:
    write(tmp_path / "sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    write(tmp_path / "proc/self/attr/current", "docker-default (enforce)\n\0")
    facts = read(tmp_path)
    assert (facts.lockdown, facts.profile) == ("integrity", "docker-default (enforce)")


def test_sysctl_that_is_no_number(tmp_path: Path) -> None:
    write(tmp_path / "proc/sys/net/core/somaxconn", "many\n")
    write(tmp_path / "proc/sys/net/ipv4/tcp_syncookies", "2\n")
    sysctls = read(tmp_path).sysctls
    assert isinstance(sysctls["net.core.somaxconn"], Unknown)
    assert sysctls["net.ipv4.tcp_syncookies"] == 2


@pytest.mark.parametrize(
    "slice_max, unit_max, quota",
    [
        ("max", "max", None),
        ("max", "150000", 1.5),
        ("100000", "max", 1.0),
        ("50000", "200000", 0.5),
    ],
)
def test_least_cpu_quota_on_the_way_up(
    tmp_path: Path, slice_max: str, unit_max: str, quota: float | None
) -> None:
    write(tmp_path / "proc/self/cgroup", "1:cpu:/old\n0::/a.slice/b.service\n")
    write(tmp_path / "sys/fs/cgroup/a.slice/cpu.max", f"{slice_max} 100000\n")
    write(tmp_path / "sys/fs/cgroup/a.slice/b.service/cpu.max", f"{unit_max} 100000\n")
    assert read(tmp_path).cpu_quota == quota


def test_interfaces_that_are_down_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/net/lo/operstate", "down\n")
    interfaces = read(tmp_path).interfaces
    assert not isinstance(interfaces, Unknown)
    assert "lo" not in [each.name for each in interfaces]


def place_of(directory: Path) -> str:
    environment = {"STEER_RUNTIME_DIR": str(directory / "steer")}
    return kernel_facts.read(environment).places[0].obstacle


def test_places_for_a_control_socket(tmp_path: Path) -> None:
    assert place_of(tmp_path) == ""
    (tmp_path / "steer").mkdir()
    assert place_of(tmp_path) == ""
    assert place_of(tmp_path / "missing") == "no such directory"
    (tmp_path / "file").write_text("")
    assert place_of(tmp_path / "file") == "ENOTDIR"
    assert [each.directory for each in read(tmp_path, "/x/y.sock").places] == [Path("/x")]


@pytest.mark.needs("root")
def test_place_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "steer").mkdir()
    os.chown(tmp_path / "steer", NOBODY, NOBODY)
    assert place_of(tmp_path) == "another user owns it"


# ---- probes


@pytest.mark.parametrize(
    "number, answer, words",
    [
        (errno.EINVAL, Answer.NO, "waitid(P_PIDFD): EINVAL; use Linux 5.4 or later"),
        (errno.ENOSYS, Answer.NO, "waitid(P_PIDFD): ENOSYS; use Linux 5.4 or later"),
        (errno.EPERM, Answer.NO, "waitid(P_PIDFD): EPERM; let the seccomp filter pass pidfd_open"),
        (errno.EMFILE, Answer.UNKNOWN, "waitid(P_PIDFD): EMFILE"),
    ],
)
@pytest.mark.parametrize("call", ["pidfd_open", "waitid"])
def test_what_every_backend_needs(
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, answer: Answer, words: str
) -> None:
    """Whatever else could be used: it is said before any worker is started."""
    assert probe.run() == features.Finding(Answer.YES)

    def refuse(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    found = probe.run()
    assert found.answer is answer
    assert str(found.note).startswith(words)
    if answer is Answer.NO:
        with pytest.raises(KernelError, match=r"^run workers: waitid"):
            probe.findings()
    probed = looking._probed(probe.run)
    [said] = [each for each in checks.judge(a_case(probes={RUN: probed})) if each.topic == "kernel"]
    assert said.verdict == ("fail" if answer is Answer.NO else "unknown")
    if answer is Answer.NO:
        assert found.cure
        assert found.cure in said.cure


@pytest.mark.needs("bpf")
def test_before_a_start_no_more_is_probed_than_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = bpf_maps.Map

    def made_map(name: str) -> bpf_maps.Map:
        made.append(name)
        return make(name)

    monkeypatch.setattr(bpf_maps, "Map", made_map)
    never = pytest.fail
    monkeypatch.setitem(probe.PROBES, features.CBPF, lambda: never("it is not to be used"))
    assert probe.findings_before_start() == {"ebpf": features.Finding(Answer.YES)}
    assert 0 < len(made) < len(abi.MAPS)


@pytest.mark.parametrize("answer", [Answer.NO, Answer.UNKNOWN])
def test_before_a_start_all_is_probed_where_the_best_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(probe, "ebpf", lambda *_: features.Finding(answer, "why"))
    monkeypatch.setitem(probe.PROBES, features.EBPF, probe.ebpf)
    found = probe.findings_before_start()
    assert found == {
        "ebpf": features.Finding(answer, "why"),
        "cbpf": features.Finding(Answer.YES),
    }


def test_what_works_is_found_out_once_and_what_does_not_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter([REFUSED, features.Finding(Answer.YES)])
    monkeypatch.setitem(probe.PROBES, features.EBPF, lambda: next(found))
    known = probe.findings()
    assert [known[name].answer for name in ("ebpf", "cbpf")] == [Answer.NO, Answer.YES]
    never = pytest.fail
    monkeypatch.setitem(probe.PROBES, features.CBPF, lambda: never("it works, as was found"))
    known = probe.findings()
    assert known["ebpf"].answer is Answer.YES
    assert probe.findings() == known


@pytest.mark.parametrize(
    ("found", "is_kept"),
    [
        (features.Finding(Answer.YES), True),
        (features.Finding(Answer.NO, "EINVAL", errno=errno.EINVAL), True),
        (features.Finding(Answer.NO, "Linux 5.4 cannot migrate connections"), True),
        (REFUSED, False),
        (features.Finding(Answer.NO, "no libbpf", errno=errno.ENOENT), False),
        (features.Finding(Answer.UNKNOWN, "ENOMEM", errno=errno.ENOMEM), False),
        (features.Finding(Answer.UNKNOWN), False),
    ],
)
def test_an_answer_is_kept_unless_it_may_be_another_later(
    monkeypatch: pytest.MonkeyPatch, found: features.Finding, is_kept: bool
) -> None:
    asked: list[features.Finding] = []

    def answer() -> features.Finding:
        asked.append(found)
        return found

    monkeypatch.setitem(probe.PROBES, features.COUNT, answer)
    assert [probe.ask(features.COUNT) for _ in range(3)] == [found] * 3
    assert len(asked) == (1 if is_kept else 3)


def test_every_feature_has_a_probe() -> None:
    assert sorted(each.name for each in probe.PROBES) == sorted(
        each.name for each in features.FEATURES
    )


def test_kernel_without_links_is_told_from_one_that_looks_for_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def link(*_: object) -> NoReturn:
        raise KernelError("attach to the cgroup", "EINVAL", errno=errno.EINVAL)

    monkeypatch.setattr(programs, "Link", link)
    found = probe.count()
    assert (found.answer, found.errno) == (Answer.NO, errno.EINVAL)
    assert str(found.note).endswith(" has no BPF_LINK_CREATE; use Linux 5.7 or later")


@pytest.mark.parametrize(
    "release, lacking",
    [
        ("5.4.0", {"5.5", "5.6", "5.7", "5.14"}),
        ("5.10.0-46-amd64", {"5.14"}),
        ("6.1", set()),
        ("custom", set()),
    ],
)
def test_kernel_says_what_a_later_one_would_give(release: str, lacking: set[str]) -> None:
    case = a_case()
    case = replace(case, facts=replace(case.facts, release=release))
    [said] = [each for each in checks.judge(case) if each.topic == "kernel"]
    assert said.verdict == "ok"
    assert {each.split()[0] for each in said.found.split("; ")[1:]} == lacking


# ---- workers


def test_workers_that_can_be_looked_at() -> None:
    assert one("workers", a_case()).verdict == "ok"


def test_workers_that_cannot() -> None:
    """Each with what is done instead, the cause and the cure."""
    refusal = Note("/proc is mounted with hidepid", "remount it")
    look, borrow = told("workers", a_case(access=Access(refusal, refusal)))
    assert (look.verdict, borrow.verdict) == ("warn", "warn")
    assert look.found.startswith("/proc is mounted with hidepid: what workers wait for")
    assert borrow.cure == "remount it"
    assert one("workers", a_case(access=Unknown("EAGAIN"))).verdict == "unknown"
