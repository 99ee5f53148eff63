"""What choosing costs, in nanoseconds above a program that does nothing.

The kernel keeps the time itself (BPF_ENABLE_STATS of bpf(2), Linux 5.8), with two
readings of the clock around every run that are in the empty program's time too. All
programs take their rounds on the very same group of UDP sockets, so that what they
are compared with is as warm as they are.

For each policy there is also a program of nothing but the helper that every choice
ends with, on slots found in the same way. What is above that one is steer's own: the
helper reads the chosen socket, which among a thousand is in no cache near by, and so
pays for what delivering the datagram would else have waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import NamedTuple

from bench import machine, programs
from bench.figures import Figure, Section, above, interleaved, ratio
from bench.flood import Flood
from steer import abi, policy
from steer.address import Bind
from steer.bytecode import Code
from steer.config import Service
from steer.cpus import Topology
from steer.kernel import bpf, compile, process, sockets, topology
from steer.plan import plan
from steer.policy import POLICIES, Scene
from steer.table import Member

SLOTS = (4, 1024)
FLOWS = {"one flow": 1, "many flows": 250}
EMPTY = "empty program"
AT_MOST_GROWTH = 1.2
_PORT = 9000


class Entry(NamedTuple):
    """A policy to measure.

    Args:
        at_most_ns: above the empty program.
        helper: the helper alone, on slots found in the same way.
        crowded: all workers on this machine's CPUs, so that those of a CPU take turns;
            else as many CPUs as workers.
    """

    policy: str
    at_most_ns: float | None
    helper: str
    crowded: bool = False


HELPERS: Mapping[str, Callable[[int], Code]] = {
    "helper alone, one slot": programs.one_slot,
    "helper alone, by hash": programs.by_hash,
    "helper alone, in turn": programs.in_turn,
    "helper alone, by chance": programs.by_chance,
}
_ONE, _HASH, _TURN, _CHANCE = HELPERS
ENTRIES = {
    "cpu": Entry("cpu", 25, _ONE),
    "cpu, CPUs shared": Entry("cpu", None, _TURN, crowded=True),
    "hash": Entry("hash", 25, _HASH),
    "random": Entry("random", 35, _CHANCE),
    "round-robin": Entry("round-robin", 35, _TURN),
}


class Subject(NamedTuple):
    """What is measured: a program, on a group of so many slots, with so many flows."""

    program: str
    slots: int
    flows: str


Found = Mapping[Subject, Sequence[float]]


def run(quick: bool) -> list[Section]:
    """Measure. Raises KernelError: eBPF programs cannot be loaded here, or not timed."""
    rounds, batches = (2, 1) if quick else (61, 10)
    process.allow_descriptors(2 * sum(SLOTS))
    with ExitStack() as stack:
        stack.enter_context(_statistics())
        stack.enter_context(machine.pinned(max(os.sched_getaffinity(0))))
        subjects: dict[Subject, Callable[[], float]] = {}
        for slots in SLOTS:
            group = Group(stack, _PORT + slots, slots)
            loaded = group.load()
            for flows, number in FLOWS.items():
                flood = stack.enter_context(Flood(group.port, number))
                for name, program in loaded.items():
                    cost_ns = partial(group.cost_ns, program, flood, batches)
                    subjects[Subject(name, slots, flows)] = cost_ns
        return _sections(interleaved(subjects, rounds))


class Group:
    """UDP sockets on one port, and every program that is tried on them.

    Args:
        stack: closes it all.
        slots: how many sockets.
    """

    def __init__(self, stack: ExitStack, port: int, slots: int) -> None:
        self.port = port
        self._slots = slots
        self._stack = stack
        self._topology = topology.read()
        self._sockets = stack.enter_context(bpf.Map("sockets", slots))
        bind = Bind("udp", "0.0.0.0", port)
        for slot in range(slots):
            sock = stack.enter_context(sockets.member(bind, 0))
            self._sockets.put_socket(slot, sock.fileno())
        self._any = sock.fileno()

    def load(self) -> dict[str, bpf.Program]:
        """Every program, by name."""
        maps = self._maps()
        codes = {name: make(self._slots) for name, make in HELPERS.items()}
        loaded = {
            name: self._program("alone", code, maps)
            for name, code in {EMPTY: programs.EMPTY, **codes}.items()
        }
        return loaded | {name: self._policy(entry) for name, entry in ENTRIES.items()}

    def cost_ns(self, program: bpf.Program, flood: Flood, batches: int) -> float:
        """The mean of one run."""
        sockets.attach_ebpf(self._any, program.fileno())
        flood.send(1)
        before_ns, before = _spent(program)
        flood.send(batches)
        after_ns, after = _spent(program)
        return (after_ns - before_ns) / (after - before)

    def _policy(self, entry: Entry) -> bpf.Program:
        """The policy, laid as steer would for as many workers as there are slots."""
        cpus = self._topology if entry.crowded else self._roomy()
        decided = plan(Service(workers=self._slots, policy=entry.policy), cpus, {})
        members = [Member(seat.number, seat.weight, seat.cpu) for seat in decided.seats]
        layout = policy.lay(POLICIES[entry.policy], members, Scene(cpus, decided.hash_length))
        maps = self._maps(decided.slots)
        self._stack.enter_context(closing(bpf.Table(maps["table"]))).flip(layout.parts())
        code = compile.load(compile.sources() / f"{entry.policy}.c").programs["migrate"]
        return self._program(entry.policy, code, maps)

    def _roomy(self) -> Topology:
        """This machine, had it a CPU for every slot."""
        cpus = tuple(range(max(self._slots, self._topology.possible[-1] + 1)))
        return Topology(cpus[: self._slots], cpus, {})

    def _maps(self, slots: int = 1) -> dict[str, bpf.Map]:
        maps = {name: self._stack.enter_context(bpf.Map(name, slots)) for name in abi.MAPS}
        maps["cpus"].put(0, abi.CPU.pack(0, 0, 1, 0, 0) * len(self._topology.possible))
        return maps | {"sockets": self._sockets}

    def _program(self, name: str, code: Code, maps: Mapping[str, bpf.Map]) -> bpf.Program:
        kind = abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE
        return self._stack.enter_context(bpf.Program(f"bench_{name}", code, maps, kind))


def _sections(found: Found) -> list[Section]:
    costs = [
        Section(f"cost, {slots} slots, {flows}", _costs(found, slots, flows))
        for flows in FLOWS
        for slots in SLOTS
    ]
    growth = [_growth(found, name, flows) for flows in FLOWS for name in ENTRIES]
    return [*costs, Section(f"cost, {SLOTS[1]} slots to {SLOTS[0]}", growth)]


def _costs(found: Found, slots: int, flows: str) -> list[Figure]:
    here = {name: found[Subject(name, slots, flows)] for name in (EMPTY, *HELPERS, *ENTRIES)}
    empty = here[EMPTY]
    return [
        Figure(f"{EMPTY}, clock and all", "ns", tuple(empty)),
        *(above(name, "ns", here[name], empty) for name in HELPERS),
        *(above(name, "ns", here[name], empty, e.at_most_ns) for name, e in ENTRIES.items()),
        *(
            above(f"{name}: steer's own", "ns", here[name], here[e.helper])
            for name, e in ENTRIES.items()
        ),
    ]


def _growth(found: Found, name: str, flows: str) -> Figure:
    few, many = (
        above(
            name, "ns", found[Subject(name, slots, flows)], found[Subject(EMPTY, slots, flows)]
        ).values
        for slots in SLOTS
    )
    at_most = AT_MOST_GROWTH if ENTRIES[name].at_most_ns else None
    return ratio(f"{name}, {flows}", many, few, at_most)


@contextmanager
def _statistics() -> Iterator[None]:
    """The kernel times programs until we let go, however we end."""
    fd = bpf.libbpf().bpf_enable_stats(0)
    if fd < 0:
        raise bpf.refusal("enable BPF statistics", -fd)
    try:
        yield
    finally:
        os.close(fd)


def _spent(program: bpf.Program) -> tuple[int, int]:
    """Nanoseconds and runs so far."""
    with open(f"/proc/self/fdinfo/{program.fileno()}") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["run_time_ns"]), int(fields["run_cnt"])
