"""What choosing costs, in nanoseconds above a program that does nothing.

The kernel keeps the time itself (BPF_ENABLE_STATS of bpf(2), Linux 5.8), with two
readings of the clock around every run that are in the empty program's time too. All
programs take their rounds on the very same group of UDP sockets, so that what they
are compared with is as warm as they are.

Beside the policies stand programs with nothing of steer's in them, only the one
helper that every choice ends with. It reads the chosen socket, which among a
thousand is seldom in a cache near by, and so is charged for what delivering the
datagram would else have waited for.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from bench import machine, programs
from bench.figures import Figure, above, interleaved, ratio
from bench.flood import Flood
from steer import abi, policy
from steer.address import Bind
from steer.bytecode import Code
from steer.config import Service
from steer.cpus import Topology
from steer.kernel import bpf, compile, sockets, topology
from steer.plan import plan
from steer.policy import POLICIES, Scene
from steer.table import Member

SLOTS = (4, 1024)
FLOWS = {"one flow": 1, "many flows": 250}
AT_MOST_NS = {"cpu": 25, "hash": 25, "random": 35, "round-robin": 35}
AT_MOST_GROWTH = 1.2
SHARED = "cpu, shared"
"""More workers than CPUs: those of a CPU take turns."""
EMPTY = "empty"
_PORT = 9000

Run = Callable[[], float]


def run(quick: bool) -> list[Figure]:
    """Measure. Raises KernelError: eBPF programs cannot be loaded."""
    rounds, batches = (3, 2) if quick else (15, 50)
    cpu = max(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.enter_context(_statistics())
        stack.enter_context(machine.pinned(cpu))
        subjects: dict[tuple[str, int, str], Run] = {}
        for slots in SLOTS:
            group = Group(stack, _PORT + slots, slots)
            loaded = group.contenders()
            for flows, number in FLOWS.items():
                flood = stack.enter_context(Flood(group.port, number))
                for name, program in loaded.items():
                    subjects[name, slots, flows] = partial(
                        group.cost_ns, program, flood, batches
                    )
        return _figures(interleaved(subjects, rounds))


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

    def contenders(self) -> dict[str, bpf.Program]:
        maps = self._maps()
        floors = {
            EMPTY: programs.EMPTY,
            "helper alone, one slot": programs.one_slot(),
            "helper alone, by hash": programs.by_hash(self._slots),
            "helper alone, in turn": programs.in_turn(self._slots),
        }
        loaded = {name: self._program("floor", code, maps) for name, code in floors.items()}
        # As many CPUs as slots, whatever this machine has: each has its own worker.
        roomy = tuple(range(max(self._slots, *self._topology.possible)))
        own = Topology(roomy[: self._slots], roomy, {})
        for name in AT_MOST_NS:
            loaded[name] = self._policy(name, own)
        loaded[SHARED] = self._policy("cpu", self._topology)
        return loaded

    def cost_ns(self, program: bpf.Program, flood: Flood, batches: int) -> float:
        """Mean of one run."""
        sockets.attach_ebpf(self._any, program.fileno())
        flood.send(1)
        before_ns, before = _spent(program)
        flood.send(batches)
        after_ns, after = _spent(program)
        return (after_ns - before_ns) / (after - before)

    def _policy(self, name: str, cpus: Topology) -> bpf.Program:
        """The policy as steer would lay it for as many workers as there are slots."""
        decided = plan(Service(workers=self._slots, policy=name), cpus, {})
        members = [Member(seat.number, seat.weight, seat.cpu) for seat in decided.seats]
        scene = Scene(cpus, decided.hash_length)
        maps = self._maps(decided.slots)
        table = self._stack.enter_context(_table(maps["table"]))
        table.flip(policy.lay(POLICIES[name], members, scene).parts())
        code = compile.load(compile.sources() / f"{name}.c").programs["migrate"]
        return self._program(name, code, maps)

    def _maps(self, slots: int = 1) -> dict[str, bpf.Map]:
        maps = {name: self._stack.enter_context(bpf.Map(name, slots)) for name in abi.MAPS}
        maps["cpus"].put(0, abi.CPU.pack(0, 0, 1, 0, 0) * len(self._topology.possible))
        return {**maps, "sockets": self._sockets}

    def _program(self, name: str, code: Code, maps: Mapping[str, bpf.Map]) -> bpf.Program:
        kind = abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE
        return self._stack.enter_context(bpf.Program(f"bench_{name}", code, maps, kind))


def _figures(found: Mapping[tuple[str, int, str], tuple[float, ...]]) -> list[Figure]:
    figures = []
    for name, slots, flows in found:
        base = found[EMPTY, slots, flows]
        if name == EMPTY:
            figures.append(Figure(f"{name} · {slots} slots · {flows}", "ns", base))
    ...
    return figures
