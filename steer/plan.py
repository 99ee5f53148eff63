"""What `steer run` will do, in order and with reasons, before any of it is done. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec

from steer import abi, cpus, ladder
from steer.address import Bind
from steer.config import Service
from steer.cpus import Topology
from steer.ladder import Finding, Rung
from steer.policy import KERNEL, POLICIES, Policy


class Seat(msgspec.Struct, frozen=True):
    """A place for a worker; who sits there may change, the place does not.

    Args:
        cpus: those it may run on: its own under a pinning policy, else all allowed.
        cpu: the one it is pinned to, or None.
    """

    number: int
    cpus: tuple[int, ...]
    cpu: int | None
    weight: int


class Act(Enum):
    """The kinds of step, in words that go before the object."""

    CLAIM = "claim the name"
    CHECK_FREE = "see that nobody is on"
    LOAD = "load"
    START = "start"


class Step(msgspec.Struct, frozen=True):
    act: Act
    object: str
    reason: str = ""


class Plan(msgspec.Struct, frozen=True):
    """Everything decided.

    Args:
        rungs: what to try, best first; see `ladder.rungs`.
        slots: capacity of the maps: room for a second generation beside the first.
        hash_length: positions of the hash table: enough for shares within 2 %.
    """

    service: Service
    name: str
    binds: tuple[Bind, ...]
    policy: Policy
    rungs: tuple[Rung, ...]
    seats: tuple[Seat, ...]
    topology: Topology
    slots: int
    hash_length: int

    @property
    def descriptors(self) -> int:
        """How many files the controller may have open at once, with room to spare."""
        return 64 + 8 * len(self.binds) + self.slots * (3 + len(self.binds))

    def steps(self) -> tuple[Step, ...]:
        rung = self.rungs[0]
        # Last before the start: the less time for somebody to slip in.
        ports = tuple(Step(Act.CHECK_FREE, bind.label) for bind in self.binds)
        program = f"{self.policy.name} as {rung.backend}"
        if rung.backend == KERNEL:
            program = "no program"
        return (
            Step(Act.CLAIM, self.name),
            Step(Act.LOAD, program, rung.reason or ""),
            *ports,
            Step(Act.START, f"{len(self.seats)} workers", self._seating()),
        )

    def describe(self) -> dict[str, object]:
        """For `steer check --json`."""
        best = self.rungs[0]
        return {
            "name": self.name,
            "policy": self.policy.name,
            "backend": best.backend,
            "backend_reason": best.reason,
            "workers": [
                {"seat": seat.number, "cpus": seat.cpus, "weight": seat.weight}
                for seat in self.seats
            ],
            "steps": [
                {"act": step.act.value, "object": step.object, "reason": step.reason or None}
                for step in self.steps()
            ],
        }

    def to_try(self, program: str) -> list[str]:
        """For whoever runs the demo: what to do next, `program` being how steer was called."""
        tcp = [bind for bind in self.binds if bind.protocol == "tcp"]
        if self.service.app or self.service.command or not tcp:
            return []
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(tcp[0].address, tcp[0].address)
        host = f"[{here}]" if tcp[0].is_v6 else here
        curl = f"curl http://{host}:{tcp[0].port}/"
        if not self.policy.pinned:
            return [curl, f"{program} status"]
        # A client on the same host arrives on its own CPU: show how to come from others.
        from_cpus = [f"taskset -c {cpu} {curl}" for cpu in self.topology.allowed[:2]]
        return [*from_cpus, f"{program} status"]

    def _seating(self) -> str:
        if not self.policy.pinned:
            return ""
        return "on CPUs " + ", ".join(str(seat.cpu) for seat in self.seats)


def plan(service: Service, topology: Topology, findings: Mapping[str, Finding]) -> Plan:
    """Decide.

    Args:
        findings: what the probes found, by backend.

    Raises:
        FallbackRefused: --strict, and the best rung that holds is a fallback.
    """
    policy = POLICIES[service.policy]
    workers = len(topology.allowed) if service.workers == "auto" else service.workers
    slots = max(64, 1 << (2 * workers - 1).bit_length())
    rungs = tuple(ladder.rungs(policy, service.backend, findings))
    ladder.choose(rungs[0], service.strict)
    return Plan(
        service,
        service.service_name,
        service.binds,
        policy,
        rungs,
        _seats(service, policy, workers, topology),
        topology,
        slots,
        _hash_length(slots, [service.weight(number) for number in range(workers)]),
    )


def _hash_length(slots: int, weights: Sequence[int]) -> int:
    """Fifty positions for the lightest, so that rounding is a hundredth of its share."""
    return min(abi.ENTRIES, max(64 * slots, 50 * -(-sum(weights) // min(weights))))


def _seats(service: Service, policy: Policy, workers: int, topology: Topology) -> tuple[Seat, ...]:
    if not policy.pinned:
        return tuple(
            Seat(number, topology.allowed, None, service.weight(number))
            for number in range(workers)
        )
    return tuple(
        Seat(number, (cpu,), cpu, service.weight(number))
        for number, cpu in enumerate(cpus.seats(workers, topology))
    )
