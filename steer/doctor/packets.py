"""Checks of the CPUs of the workers, and of the CPUs that receive packets."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from steer.config.plan import Plan, WorkerSpec
from steer.doctor.case import MOUNT_SYSFS, Case, Opinion, known
from steer.doctor.facts import Unknown
from steer.linux.nic import Interface, cpus_taking_packets
from steer.policy import cpus
from steer.policy.cpus import cpus_named
from steer.values import plural


def pinned_cpus(case: Case) -> Iterator[Opinion]:
    if isinstance(case.plan, Unknown):
        yield Opinion("fail", case.plan.reason, MOUNT_SYSFS)
        return
    allowed, workers = case.plan.topology.allowed, len(case.plan.specs)
    found = f"{plural(workers, 'worker')} on {cpus_named(allowed)}"
    quota = case.facts.cpu_quota
    if isinstance(quota, float) and workers > quota:
        cure = f"--workers {max(1, int(quota))}, or raise the cgroup's cpu.max"
        yield Opinion("warn", f"{found}, but the cgroup may use only {quota:g} CPUs' time", cure)
    else:
        yield Opinion("ok", found)


def receive_queues(case: Case) -> Iterator[Opinion]:
    """Whether packets reach all workers, for each interface. Only for policies that select by the
    CPU."""
    if not (case.policy.pinned and case.is_steered):
        return
    plan = known(case.plan, MOUNT_SYSFS)
    interfaces = known(case.facts.interfaces)
    yield from _loopback(interfaces)
    if all(_is_loopback(bind.address) for bind in case.service.binds):
        return
    outer = [each for each in interfaces if each.name != "lo"]
    noted = [each for each in outer if each.note]
    judged = [each for each in outer if not each.note]
    yield from (_spread(each, plan) for each in judged)
    if noted:
        yield _notes(noted, is_judged=bool(judged), mask=cpumask(_worker_cpus(plan.specs)))


def _loopback(interfaces: Iterable[Interface]) -> Iterator[Opinion]:
    if any(each.name == "lo" and each.note for each in interfaces):
        yield Opinion("ok", "lo: clients on this host get the worker of the CPU that they run on")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _notes(noted: Iterable[Interface], is_judged: bool, mask: str) -> Opinion:
    """The notes of interfaces whose CPUs are not known.

    Args:
        is_judged: whether another interface, such as the card below a bridge, has an opinion.
    """
    notes: dict[str, list[str]] = {}
    for each in noted:
        notes.setdefault(each.note, []).append(each.name)
    found = "; ".join(f"{', '.join(names)}: {note}" for note, names in notes.items())
    if is_judged:
        return Opinion("ok", found)
    names = [name for group in notes.values() for name in group]
    return Opinion("unknown", found, f"look on the host, or {_steer_packets(names[0], mask)}")


def _spread(interface: Interface, plan: Plan) -> Opinion:
    """Whether every worker gets packets of this interface, and on its own CPU."""
    worker_cpus = _worker_cpus(plan.specs)
    cure = _spread_cure(interface, worker_cpus)
    taking = cpus_taking_packets(interface)
    if taking is None:
        return Opinion(
            "unknown", f"{interface.name}: the CPUs of its interrupts are not known", cure
        )
    home = cpus.nearest(worker_cpus, plan.topology)
    idle = worker_cpus - {home[cpu] for cpu in taking if cpu in home}
    found = f"{interface.name}: packets come in on {cpus_named(sorted(taking))}"
    if idle:
        return Opinion("warn", f"{found}; workers on {cpus_named(sorted(idle))} get none", cure)
    if taking.isdisjoint(worker_cpus):
        return Opinion("warn", f"{found}, where no worker is", cure)
    return Opinion("ok", f"{found}; every worker gets some")


def _worker_cpus(specs: Iterable[WorkerSpec]) -> frozenset[int]:
    return frozenset(spec.cpu for spec in specs if spec.cpu is not None)


def _spread_cure(interface: Interface, worker_cpus: frozenset[int]) -> str:
    """How to spread packets over the CPUs of the workers: by more receive queues, by the CPUs of
    their interrupts, or by Receive Packet Steering."""
    by_software = _steer_packets(interface.name, cpumask(worker_cpus))
    if interface.driver is None or interface.channels is None:
        return by_software
    if interface.channels >= len(worker_cpus):
        return f"start irqbalance, or set /proc/irq/*/smp_affinity_list; else {by_software}"
    return f"ethtool -L {interface.name} combined {len(worker_cpus)}; else {by_software}"


def _steer_packets(name: str, mask: str) -> str:
    return f"echo {mask} | tee /sys/class/net/{name}/queues/rx-*/rps_cpus"


def cpumask(numbers: Iterable[int]) -> str:
    """CPUs in the kernel's mask format, the reverse of `topology.parse_cpumask`."""
    digits = f"{sum(1 << cpu for cpu in set(numbers)):x}"
    groups = [digits[max(0, end - 8) : end] for end in range(len(digits), 0, -8)]
    return ",".join(reversed(groups))
