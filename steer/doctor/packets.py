"""Checks of CPUs, and of which of them packets come in on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from steer.config.plan import Plan
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
        yield Opinion("warn", f"{found}, in a cgroup that may use {quota:g} at a time", cure)
    else:
        yield Opinion("ok", found)


def receive_queues(case: Case) -> Iterator[Opinion]:
    """Interface by interface, those that have a say in which worker is chosen."""
    if not (case.policy.pinned and case.is_steered):
        return
    plan = known(case.plan, MOUNT_SYSFS)
    interfaces = known(case.facts.interfaces)
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
    return frozenset(spec.cpu for spec in plan.specs if spec.cpu is not None)


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
