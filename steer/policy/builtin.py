"""The list of built-in policies. A policy is a row here and a file in bpf/. Pure."""

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
"""Best first: a fallback goes to the next one."""


class LayoutContext(msgspec.Struct, frozen=True):
    """The inputs of a layout other than its members.

    Args:
        hash_length: number of positions for `consistent`.
        longest: limit for the turns in a table.
        previous: the current layout, or None.
    """

    topology: Topology
    hash_length: int
    longest: int = table.MAX_RING
    previous: Layout | None = None


Build = Callable[[Sequence[Member], LayoutContext], Layout]
LAYOUTS: Mapping[str, Build] = {
    "consistent": lambda members, context: table.consistent(
        members, context.previous, context.hash_length
    ),
    "shares": lambda members, context: table.by_share(members, context.longest),
    "turns": lambda members, _context: table.by_turn(members),
    "cpus": lambda members, context: table.by_cpu(members, context.topology, context.longest),
    "ring": lambda members, _context: table.by_load(members),
}
"""The function that fills a table, by the kind that a policy declares with STEER_TABLE."""
PINNING = "cpus"
BY_LOAD = "ring"

Assemble = Callable[[Layout, Mapping[int, int], int, Sequence[int]], list[classic.Insn]]
"""Makes a program from a layout, indexes of sockets, the seed of the hash, and parameters."""


class Policy(msgspec.Struct, frozen=True):
    """A policy.

    Args:
        source: the name of its file in bpf/ without the suffix; for a custom policy the path of
            its file; None for the kernel's own hash.
        table: the kind of its table, a key of `LAYOUTS`.
        assemble: makes the classic BPF program. None if there is none; `no_cbpf` says why.
        declared: the declarations in its file; see `loader.find.find`.
        digest: a digest of the text of a custom policy.
        problem: why a custom policy cannot be loaded. A service that already runs keeps going.
        candidates: the policies that `auto` may become: the first if open connections can be
            counted, else the second.
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
        """Whether it selects by the number of open connections."""
        return self.table == BY_LOAD

    @property
    def is_custom(self) -> bool:
        """Whether it is a custom policy."""
        return self.source is not None and self.source.endswith(CUSTOM_SUFFIX)

    @property
    def backends(self) -> tuple[str, ...]:
        if self.source is None:
            return (KERNEL,)
        return BACKENDS if self.assemble else (EBPF, KERNEL)


CUSTOM_SUFFIX = ".c"


def custom(name: str, path: str, declared: Declared, digest: str) -> Policy:
    """A custom policy.

    Args:
        path: the path of its file.
        digest: a digest of its text.
    """
    why_not = "classic BPF cannot run a custom policy"
    return Policy(name, declared.summary, path, declared.table, None, why_not, declared, digest)


_ALL = (
    Policy(
        "cpu",
        "the worker pinned to the CPU that receives the packet",
        "cpu",
        "cpus",
        lambda layout, indexes, _seed, _params: classic.by_cpu(layout, indexes),
    ),
    Policy(
        "round-robin",
        "the workers in turn",
        "round-robin",
        "turns",
        no_cbpf="classic BPF keeps no state, so it cannot take turns",
    ),
    Policy(
        "least-conn",
        "the worker with the fewest open connections",
        "least-conn",
        "ring",
        no_cbpf="classic BPF cannot read the counts of connections",
    ),
    Policy(
        "hash",
        "by the hash of the four-tuple; if a worker leaves, only its flows move",
        "hash",
        "consistent",
        lambda layout, indexes, seed, _params: classic.by_hash(layout, indexes, seed),
    ),
    Policy(
        "source",
        "a worker by the client's address",
        "source",
        "consistent",
        lambda layout, indexes, seed, params: classic.by_source(layout, indexes, seed, *params),
    ),
    Policy(
        "flow",
        "over UDP, a flow stays with the worker that first got it",
        "flow",
        "consistent",
        no_cbpf="classic BPF keeps no state, so it cannot remember flows",
    ),
    Policy(
        "random",
        "a random worker, in proportion to the weights",
        "random",
        "shares",
        lambda layout, indexes, _seed, _params: classic.by_share(layout, indexes),
    ),
    Policy("kernel", "the kernel's own hash; no program"),
)

POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in _ALL}
AUTO = "auto"
"""A name that can be given in place of a policy's."""


def auto(by_load: Policy, by_flow: Policy) -> Policy:
    """The policy named `auto`."""
    return Policy(AUTO, "least-conn, or hash", candidates=(by_load, by_flow))


def built_in(name: str) -> Policy:
    """The policy of that name, or `auto`, without the declarations in its file."""
    return auto(*(POLICIES[each] for each in AUTO_BECOMES)) if name == AUTO else POLICIES[name]


AUTO_BECOMES = ("least-conn", "hash")


def build_layout(policy: Policy, members: Sequence[Member], context: LayoutContext) -> Layout:
    """The layout for these members. Without any, the kernel's hash selects."""
    if policy.source is None or not members:
        return table.empty_layout()
    return LAYOUTS[policy.table](members, context)
