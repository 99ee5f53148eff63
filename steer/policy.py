"""The table of policies. A new one is a row here and a file in bpf/. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from steer import cbpf, table
from steer.cpus import Topology
from steer.table import Layout, Member

EBPF, CBPF, KERNEL = "ebpf", "cbpf", "kernel"
BACKENDS = (EBPF, CBPF, KERNEL)
"""Best first: the ladder is walked down in this order."""


class Scene(msgspec.Struct, frozen=True):
    """What a layout is made from, beside the members.

    Args:
        hash_length: positions of the hash table.
        longest: turns that a table may hold.
        previous: the layout in force, or None.
    """

    topology: Topology
    hash_length: int
    longest: int = table.MAX_DECK
    previous: Layout | None = None


Fill = Callable[[Sequence[Member], Scene], Layout]
Assemble = Callable[[Layout, Mapping[int, int], int], list[cbpf.Insn]]


class Policy(msgspec.Struct, frozen=True):
    """One way to choose.

    Args:
        source: its file in bpf/, without the ending; None: the kernel's own choice.
        fill: makes the table from the members.
        assemble: makes the classic BPF program from table, indexes and hash seed; None
            where classic BPF cannot do it, and `no_cbpf` says why.
        pinned: each worker is pinned to a CPU.
    """

    name: str
    summary: str
    source: str | None = None
    fill: Fill | None = None
    assemble: Assemble | None = None
    no_cbpf: str = ""
    pinned: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        if self.source is None:
            return (KERNEL,)
        return BACKENDS if self.assemble else (EBPF, KERNEL)


_ALL = (
    Policy(
        "cpu",
        "the worker pinned to the CPU that takes in the packet",
        "cpu",
        lambda members, scene: table.by_cpu(members, scene.topology, scene.longest),
        lambda layout, indexes, _seed: cbpf.by_cpu(layout, indexes),
        pinned=True,
    ),
    Policy(
        "round-robin",
        "each worker in its turn",
        "round-robin",
        lambda members, _scene: table.by_turn(members),
        no_cbpf="classic BPF keeps no state, so it cannot take turns",
    ),
    Policy(
        "hash",
        "by the flow's four-tuple; when a worker goes, only its flows move",
        "hash",
        lambda members, scene: table.consistent(members, scene.previous, scene.hash_length),
        cbpf.by_hash,
    ),
    Policy(
        "random",
        "by chance, in proportion to the weights",
        "random",
        lambda members, scene: table.by_share(members, scene.longest),
        lambda layout, indexes, _seed: cbpf.by_share(layout, indexes),
    ),
    Policy("kernel", "the kernel's own hash; no program"),
)

POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in _ALL}


def lay(policy: Policy, members: Sequence[Member], scene: Scene) -> Layout:
    """The layout for these members; with none, one that leaves the choice to the kernel."""
    if policy.fill is None or not members:
        return table.EMPTY
    return policy.fill(members, scene)
