"""Which CPU each worker is pinned to, and which worker serves each CPU. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

import msgspec


class Topology(msgspec.Struct, frozen=True):
    """The CPUs of the machine. Numbers need not start at 0 or be contiguous.

    Args:
        allowed: CPUs that this process may run on (its cpuset), ascending.
        possible: every CPU that may ever receive a packet, ascending.
        node_of: the NUMA node of each possible CPU; the default is node 0.
    """

    allowed: tuple[int, ...]
    possible: tuple[int, ...]
    node_of: Mapping[int, int]

    def node(self, cpu: int) -> int:
        return self.node_of.get(cpu, 0)


def cpu_of_each(workers: int, topology: Topology) -> list[int]:
    """The CPU of each worker: the allowed CPUs in turn, alternating between NUMA nodes.

    So each node gets its share of workers, even if there are fewer workers than CPUs.
    """
    order = _interleaved(topology)
    return [order[i % len(order)] for i in range(workers)]


def cpu_of_each_slot(
    affinities: Mapping[int, Collection[int]], topology: Topology
) -> dict[int, int]:
    """The CPU that each slot serves if steer does not pin workers itself: one that its thread may
    run on, and that as few other slots serve as possible.

    Args:
        affinities: for each slot, the CPUs that its thread may run on; empty: that is not known.
    """
    order = _interleaved(topology)
    rank = {cpu: at for at, cpu in enumerate(order)}
    taken: dict[int, int] = {}
    found = {}
    # Who has the least choice chooses first.
    choices = sorted((len(cpus) or len(order), slot) for slot, cpus in affinities.items())
    for _, slot in choices:
        cpu = min(
            affinities[slot] or order,
            key=lambda cpu: (taken.get(cpu, 0), rank.get(cpu, len(rank)), cpu),
        )
        taken[cpu] = taken.get(cpu, 0) + 1
        found[slot] = cpu
    return found


def nearest(staffed: Collection[int], topology: Topology) -> dict[int, int]:
    """For each possible CPU, the CPU in `staffed` whose workers serve it.

    That is the CPU itself if it is in `staffed`, else one of the same NUMA node, else any. CPUs
    without a worker are distributed evenly.

    Args:
        staffed: CPUs that have a worker; not empty.
    """
    served = sorted(staffed)
    by_node: dict[int, list[int]] = {}
    for cpu in served:
        by_node.setdefault(topology.node(cpu), []).append(cpu)
    home = {cpu: cpu for cpu in served}
    taken_on = dict.fromkeys(served, 0)
    unserved = set(topology.possible) - set(served)
    # CPUs of nodes without any worker come last, and so level the distribution.
    for cpu in sorted(unserved, key=lambda cpu: (topology.node(cpu) not in by_node, cpu)):
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
    """The kernel's notation for a list of CPUs: "0-3,8"."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "-"


def cpus_named(cpus: Sequence[int]) -> str:
    """A list of CPUs with the noun: "CPU 1", "CPUs 0-3,8"."""
    return f"{'CPU' if len(cpus) == 1 else 'CPUs'} {cpu_list(cpus)}"
