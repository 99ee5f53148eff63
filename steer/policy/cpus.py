"""Which CPU a worker is pinned to, and which workers a CPU's connections go to. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

import msgspec


class Topology(msgspec.Struct, frozen=True):
    """The machine's CPUs. Numbers need not start at 0 or be contiguous.

    Args:
        allowed: CPUs this process may run on (its cpuset), ascending.
        possible: every CPU that may ever take in a packet, ascending.
        node_of: NUMA node of each possible CPU; a CPU left out is on node 0.
    """

    allowed: tuple[int, ...]
    possible: tuple[int, ...]
    node_of: Mapping[int, int]

    def node(self, cpu: int) -> int:
        return self.node_of.get(cpu, 0)


def cpu_of_each(workers: int, topology: Topology) -> list[int]:
    """The CPU of each worker: all allowed CPUs in turn, one NUMA node after another.

    With fewer workers than CPUs every node so gets its share of them.
    """
    order = _interleaved(topology)
    return [order[i % len(order)] for i in range(workers)]


def nearest(manned: Collection[int], topology: Topology) -> dict[int, int]:
    """For each possible CPU the CPU in `manned` that serves it.

    Itself if manned, else one of its own NUMA node, else any; the CPUs without a
    worker are dealt evenly over those that have one.

    Args:
        manned: CPUs that have a worker; not empty.
    """
    served = sorted(manned)
    by_node: dict[int, list[int]] = {}
    for cpu in served:
        by_node.setdefault(topology.node(cpu), []).append(cpu)
    home = {cpu: cpu for cpu in served}
    taken_on = dict.fromkeys(served, 0)
    strays = set(topology.possible) - set(served)
    # Those with nobody on their node come last, and so even out the others.
    for cpu in sorted(strays, key=lambda cpu: (topology.node(cpu) not in by_node, cpu)):
        home[cpu] = min(by_node.get(topology.node(cpu), served), key=taken_on.__getitem__)
        taken_on[home[cpu]] += 1
    return home


def _interleaved(topology: Topology) -> Sequence[int]:
    by_node: dict[int, list[int]] = {}
    for cpu in topology.allowed:
        by_node.setdefault(topology.node(cpu), []).append(cpu)
    rounds = zip_longest(*(by_node[node] for node in sorted(by_node)))
    return [cpu for round_ in rounds for cpu in round_ if cpu is not None]


def cpu_list(cpus: Sequence[int]) -> str:
    """As the kernel writes it: "0-3,8"."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "-"


def cpus_named(cpus: Sequence[int]) -> str:
    """With the noun: "CPU 1", "CPUs 0-3,8"."""
    return f"{'CPU' if len(cpus) == 1 else 'CPUs'} {cpu_list(cpus)}"
