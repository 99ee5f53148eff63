"""Reads which CPUs there are, which of them this process may use, and the NUMA node of each.

The numbers are those of the kernel, and need not be consecutive.
"""

from __future__ import annotations

import os

from steer.errors import KernelError
from steer.policy.cpus import Topology


def read(sysfs: str = "/sys") -> Topology:
    """The topology as this process sees it (sched_getaffinity(2), sysfs).

    Raises:
        KernelError: sysfs is not mounted. Guessing the possible CPUs instead would
            make a read of a per-CPU map overrun its buffer.
    """
    possible = _possible(f"{sysfs}/devices/system/cpu/possible")
    nodes = _nodes(f"{sysfs}/devices/system/node")
    return Topology(
        allowed=tuple(sorted(os.sched_getaffinity(0))),
        possible=possible,
        node_of={cpu: nodes.get(cpu, 0) for cpu in possible},
    )


def changed(before: Topology) -> Topology | None:
    """The current topology if this process may use other CPUs than before, because its cpuset was
    changed or a CPU went on- or offline (cpuset(7), sched_getaffinity(2)); otherwise None.

    Raises:
        KernelError: as `read`.
    """
    return None if os.sched_getaffinity(0) == set(before.allowed) else read()


def parse_cpulist(text: str) -> tuple[int, ...]:
    """The CPUs of the kernel's list format: "0-2,8" is (0, 1, 2, 8), "" is ().

    Raises:
        ValueError: it is not a list of that format.
    """
    cpus: list[int] = []
    for part in text.strip().split(",") if text.strip() else ():
        first, dash, last = part.partition("-")
        cpus.extend(range(int(first), int(last if dash else first) + 1))
    return tuple(cpus)


def parse_cpumask(text: str) -> tuple[int, ...]:
    """The CPUs of the kernel's mask format: 32-bit groups in hexadecimal, the highest
    first: "1,00000003" is (0, 1, 32).

    Raises:
        ValueError: it is not a mask of that format.
    """
    mask = int("".join(group.zfill(8) for group in text.strip().split(",")), 16)
    return tuple(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)


def _possible(path: str) -> tuple[int, ...]:
    try:
        with open(path) as file:
            return parse_cpulist(file.read())
    except OSError as error:
        raise KernelError.from_oserror(f"read {path}", error, cure="mount sysfs on /sys") from error


def _nodes(directory: str) -> dict[int, int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return {}
    nodes = [int(name[4:]) for name in names if name.startswith("node") and name[4:].isdigit()]
    return {cpu: node for node in sorted(nodes) for cpu in _cpus_of(f"{directory}/node{node}")}


def _cpus_of(node_directory: str) -> tuple[int, ...]:
    with open(f"{node_directory}/cpulist") as file:
        return parse_cpulist(file.read())
