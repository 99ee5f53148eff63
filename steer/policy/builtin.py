"""The table of policies. A new one is a row here and a file in bpf/. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from steer.errors import SteerError
from steer.policy import classic
from steer.policy import layout as table
from steer.policy.cpus import Topology
from steer.policy.declarations import Declared
from steer.policy.layout import Layout, Member

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
FILLS: Mapping[str, Fill] = {
    "consistent": lambda members, scene: table.consistent(
        members, scene.previous, scene.hash_length
    ),
    "shares": lambda members, scene: table.by_share(members, scene.longest),
    "turns": lambda members, _scene: table.by_turn(members),
    "cpus": lambda members, scene: table.by_cpu(members, scene.topology, scene.longest),
    "deck": lambda members, _scene: table.by_load(members),
}
"""By what a policy declares as its STEER_TABLE."""
PINNING = "cpus"
BY_LOAD = "deck"

Assemble = Callable[[Layout, Mapping[int, int], int, Sequence[int]], list[classic.Insn]]
"""From table, indexes, the seed of a hash, and parameters."""


class Policy(msgspec.Struct, frozen=True):
    """One way to choose.

    Args:
        source: its file in bpf/, without the ending, or the path of one of the user's own;
            None: the kernel's own choice.
        table: how the table is filled, a key of `FILLS`.
        assemble: makes the classic BPF program; None where that cannot be, and `no_cbpf` says
            why.
        declared: what the file says of itself; see `loader.find.find`.
        digest: of one of the user's own: another when its text is.
        problem: why it cannot be, where only a service that runs already can go on.
        candidates: of `auto`, which is no policy by itself: the policies that it may become. By
            load where that can be counted, else by flow.
    """

    name: str
    summary: str
    source: str | None = None
    table: str = "consistent"
    assemble: Assemble | None = None
    no_cbpf: str = ""
    declared: Declared = Declared()
    digest: str = ""
    problem: SteerError | None = None
    candidates: tuple[Policy, ...] = ()

    @property
    def pinned(self) -> bool:
        """Whether each worker is pinned to a CPU."""
        return self.table == PINNING

    @property
    def reads_load(self) -> bool:
        """Whether it goes by how many connections each worker has open."""
        return self.table == BY_LOAD

    @property
    def is_own(self) -> bool:
        """Whether it is one of the user's own."""
        return self.source is not None and self.source.endswith(OWN_SUFFIX)

    @property
    def backends(self) -> tuple[str, ...]:
        if self.source is None:
            return (KERNEL,)
        return BACKENDS if self.assemble else (EBPF, KERNEL)


OWN_SUFFIX = ".c"


def own(name: str, path: str, declared: Declared, digest: str) -> Policy:
    """One of the user's own.

    Args:
        path: of its file.
        digest: of the text.
    """
    why_not = "classic BPF cannot run a policy of one's own"
    return Policy(name, declared.summary, path, declared.table, None, why_not, declared, digest)


_ALL = (
    Policy(
        "cpu",
        "the worker pinned to the CPU that takes in the packet",
        "cpu",
        "cpus",
        lambda layout, indexes, _seed, _params: classic.by_cpu(layout, indexes),
    ),
    Policy(
        "round-robin",
        "each worker in its turn",
        "round-robin",
        "turns",
        no_cbpf="classic BPF keeps no state, so it cannot take turns",
    ),
    Policy(
        "least-conn",
        "the worker with the fewest open connections",
        "least-conn",
        "deck",
        no_cbpf="classic BPF cannot read what is counted",
    ),
    Policy(
        "hash",
        "by the flow's four-tuple; when a worker goes, only its flows move",
        "hash",
        "consistent",
        lambda layout, indexes, seed, _params: classic.by_hash(layout, indexes, seed),
    ),
    Policy(
        "source",
        "a client's address keeps its worker",
        "source",
        "consistent",
        lambda layout, indexes, seed, params: classic.by_source(layout, indexes, seed, *params),
    ),
    Policy(
        "flow",
        "over UDP, a flow stays with the worker that first got it",
        "flow",
        "consistent",
        no_cbpf="classic BPF remembers nothing",
    ),
    Policy(
        "random",
        "by chance, in proportion to the weights",
        "random",
        "shares",
        lambda layout, indexes, _seed, _params: classic.by_share(layout, indexes),
    ),
    Policy("kernel", "the kernel's own hash; no program"),
)

POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in _ALL}
AUTO = "auto"
"""What may be asked for in place of a policy."""


def auto(by_load: Policy, by_flow: Policy) -> Policy:
    """What is asked for as `auto`."""
    return Policy(AUTO, "least-conn, or hash", candidates=(by_load, by_flow))


def built_in(name: str) -> Policy:
    """The policy of that name, or `auto`; as long as nobody reads its file it declares nothing."""
    return auto(*(POLICIES[each] for each in AUTO_BECOMES)) if name == AUTO else POLICIES[name]


AUTO_BECOMES = ("least-conn", "hash")


def lay(policy: Policy, members: Sequence[Member], scene: Scene) -> Layout:
    """The layout for these members; with none, one that leaves the choice to the kernel."""
    if policy.source is None or not members:
        return table.EMPTY
    return FILLS[policy.table](members, scene)
