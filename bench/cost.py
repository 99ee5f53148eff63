"""What choosing costs, in nanoseconds above a program that does nothing.

The kernel keeps the time itself (BPF_ENABLE_STATS of bpf(2), Linux 5.8), with two
readings of the clock around every run that are in the empty program's time too. All
programs take their rounds on the very same group of UDP sockets, so that what they
are compared with is as warm as they are.

For each policy there is also a program of nothing but the helper that every choice
ends with, on slots found in the same way. What is above that one is steer's own: the
helper reads the chosen socket, which among a thousand is in no cache near by, and so
pays for what delivering the datagram would else have waited for.

Handshakes are what a policy that knows load is asked for: over TCP it does more than with
a datagram. There the sockets listen, and each packet is a SYN.

With another checkout (`loaded.BASE`) its programs are measured beside ours, on the same sockets.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from bench import loaded, machine, opens, programs
from bench.figures import Figure, Section, above, interleaved, ratio
from bench.flood import Flood, Handshakes
from steer import abi
from steer.config import address
from steer.linux import descriptors
from steer.loader import bpf_maps, cost, libbpf
from steer.loader.programs import Program
from steer.policy.bytecode import Code
from steer.sockets import group_program, reuseport

SLOTS = (8, 64, 1024)
EMPTY = "empty program"
AT_MOST_GROWTH = 1.2
OTHER = "the other checkout"
_PORT = 9000


class Traffic(NamedTuple):
    """What is sent.

    Args:
        protocol: "udp" or "tcp".
        flows: how many clients.
        share: of the batches.
    """

    protocol: str
    flows: int
    share: float


TRAFFIC = {
    "one flow": Traffic("udp", 1, 1),
    "many flows": Traffic("udp", 250, 1),
    "handshakes": Traffic("tcp", 250, 0.2),
}


class Entry(NamedTuple):
    """A policy to measure.

    Args:
        at_most_ns: above the helper alone, by slots.
        helper: the helper alone, on slots found in the same way.
        crowded: all workers on this machine's CPUs, so that those of a CPU take turns;
            else as many CPUs as workers.
        even: it is to cost as much with many slots as with few.
    """

    policy: str
    at_most_ns: Mapping[int, float]
    helper: str
    crowded: bool = False
    even: bool = True


def _always(at_most_ns: float) -> Mapping[int, float]:
    return dict.fromkeys(SLOTS, at_most_ns)


HELPERS: Mapping[str, Callable[[int], Code]] = {
    "helper alone, one slot": programs.one_slot,
    "helper alone, by hash": programs.by_hash,
    "helper alone, in turn": programs.in_turn,
    "helper alone, by chance": programs.by_chance,
    "helper alone, and one that reads the address": programs.by_address,
}
_ONE, _HASH, _TURN, _CHANCE, _ = HELPERS
ENTRIES = {
    "cpu": Entry("cpu", _always(5), _ONE),
    "cpu, CPUs shared": Entry("cpu", {}, _TURN, crowded=True, even=False),
    "hash": Entry("hash", _always(5), _HASH),
    "random": Entry("random", {}, _CHANCE),
    "round-robin": Entry("round-robin", _always(8), _TURN),
    "source": Entry("source", _always(20), _HASH),
    "flow": Entry("flow", _always(10), _HASH, even=False),
    "least-conn": Entry("least-conn", {8: 25, 64: 60}, _CHANCE, even=False),
}


class Subject(NamedTuple):
    """What is measured: a program, on a group of so many slots, with which traffic."""

    program: str
    slots: int
    traffic: str


Found = Mapping[Subject, Sequence[float]]


def run(quick: bool) -> list[Section]:
    """Measure. Raises KernelError: eBPF programs cannot be loaded here, or not timed."""
    rounds, batches = (1, 1) if quick else (31, 10)
    descriptors.allow_descriptors(4 * sum(SLOTS))
    with ExitStack() as stack:
        stack.enter_context(cost.statistics())
        stack.enter_context(machine.pinned(max(os.sched_getaffinity(0))))
        found = interleaved(_subjects(stack, batches), rounds)
        return [*_sections(found), opens.section(quick)]


def _subjects(stack: ExitStack, batches: int) -> dict[Subject, Callable[[], float]]:
    subjects: dict[Subject, Callable[[], float]] = {}
    for slots in SLOTS:
        groups = {name: Group(stack, name, _PORT + slots, slots) for name in ("udp", "tcp")}
        loaded = {name: group.load() for name, group in groups.items()}
        for name, traffic in TRAFFIC.items():
            group = groups[traffic.protocol]
            kind = Handshakes if traffic.protocol == "tcp" else Flood
            flood = stack.enter_context(kind(group.port, traffic.flows))
            number = max(1, round(batches * traffic.share))
            for program, each in loaded[traffic.protocol].items():
                cost_ns = partial(group.cost_ns, each, flood, number)
                subjects[Subject(program, slots, name)] = cost_ns
    return subjects


class Group:
    """Sockets on one port, and every program that is tried on them.

    Args:
        stack: closes it all.
        slots: how many sockets.
    """

    def __init__(self, stack: ExitStack, protocol: str, port: int, slots: int) -> None:
        self.port = port
        self._slots = slots
        self._stack = stack
        self._address = f"{protocol}://0.0.0.0:{port}"
        self._sockets = stack.enter_context(bpf_maps.Map("sockets", loaded.CAPACITY))
        for slot in range(slots):
            sock = stack.enter_context(reuseport.member(address.parse(self._address), 1))
            # Full at once: memory for what waits there would drive all else from the caches.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
            self._sockets.put_socket(slot, sock.fileno())
        self._any = sock.fileno()

    def load(self) -> dict[str, libbpf.Descriptor]:
        """Every program, by name."""
        alone = {EMPTY: cost.EMPTY, **{name: of(self._slots) for name, of in HELPERS.items()}}
        kind = abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE
        maps = {"sockets": self._sockets, "table": self._stack.enter_context(bpf_maps.Map("table"))}
        found: dict[str, libbpf.Descriptor] = {
            name: self._stack.enter_context(Program("bench", code, maps, kind))
            for name, code in alone.items()
        }
        wanted = [(entry.policy, entry.crowded) for entry in ENTRIES.values()]
        group = (self._address, self._slots, wanted)
        ours = loaded.policy_programs(self._stack, self._sockets, *group)
        theirs = loaded.of_base(self._stack, "policies", self._sockets.fileno(), *group)
        names = [*ENTRIES, *(_of_other(name) for name in ENTRIES)]
        return found | dict(zip(names, [*ours, *theirs], strict=bool(theirs)))

    def cost_ns(self, program: libbpf.Descriptor, flood: Flood, batches: int) -> float:
        """The mean of one run."""
        group_program.attach_ebpf(self._any, program.fileno())
        flood.send(1)
        before_ns, before = cost.run_stats(program)
        flood.send(batches)
        after_ns, after = cost.run_stats(program)
        return (after_ns - before_ns) / (after - before)


def _of_other(name: str) -> str:
    return f"{name}, {OTHER}"


def _sections(found: Found) -> list[Section]:
    costs = [
        Section(f"cost, {slots:,} slots, {traffic}", _costs(found, slots, traffic))
        for traffic in TRAFFIC
        for slots in SLOTS
    ]
    growth = [_growth(found, name, traffic) for traffic in TRAFFIC for name in ENTRIES]
    return [*costs, Section(f"cost, {SLOTS[-1]:,} slots to {SLOTS[0]}", growth)]


def _costs(found: Found, slots: int, traffic: str) -> list[Figure]:
    here = {
        each.program: values
        for each, values in found.items()
        if (each.slots, each.traffic) == (slots, traffic)
    }
    empty = here[EMPTY]
    others = {name: entry for name, entry in ENTRIES.items() if _of_other(name) in here}
    return [
        Figure(f"{EMPTY}, clock and all", "ns", tuple(empty)),
        *(above(name, "ns", here[name], empty) for name in (*HELPERS, *ENTRIES)),
        *(
            above(
                f"{name}: steer's own",
                "ns",
                here[name],
                here[entry.helper],
                entry.at_most_ns.get(slots),
            )
            for name, entry in ENTRIES.items()
        ),
        *(
            above(f"{name}: steer's own, {OTHER}", "ns", here[_of_other(name)], here[entry.helper])
            for name, entry in others.items()
        ),
    ]


def _growth(found: Found, name: str, traffic: str) -> Figure:
    few, many = (
        above(
            name, "ns", found[Subject(name, slots, traffic)], found[Subject(EMPTY, slots, traffic)]
        ).values
        for slots in (SLOTS[0], SLOTS[-1])
    )
    at_most = AT_MOST_GROWTH if ENTRIES[name].even else None
    return ratio(f"{name}, {traffic}", many, few, at_most)
