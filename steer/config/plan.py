"""The plan of a service: what `steer run` will do, in order and with reasons. Pure.

`planning` makes a plan; `plan_change` makes another one for a service that already runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import msgspec

from steer.config.address import Bind
from steer.config.candidates import BackendCandidate, PolicyCandidate
from steer.config.service import MAX_WORKERS, Service
from steer.policy.builtin import KERNEL, Policy
from steer.policy.cpus import Topology
from steer.values import plural, several


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker is to be. Workers that replace one another have the same spec.

    Args:
        cpus: the CPUs that it may run on: one under a pinning policy, else all that steer may use.
        cpu: the CPU that it is pinned to; None: it is not pinned.
        is_spare: whether it is kept ready and not selected, see `workers.spares`.
    """

    number: int
    cpus: tuple[int, ...]
    cpu: int | None
    weight: int
    is_spare: bool = False


def in_words(workers: int, spares: int) -> str:
    """How many workers, and how many spares if there are any."""
    words = plural(workers, "worker")
    return f"{words} and {plural(spares, 'spare')}" if spares else words


class Generation(msgspec.Struct, frozen=True):
    """The workers that are started from one reading of the configuration."""

    number: int
    plan: Plan


class Act(Enum):
    """The kinds of steps. `steer check` prints the value before the object of the step."""

    CLAIM = "claim the name"
    CHECK_FREE = "check that nothing listens on"
    LOAD = "load"
    START = "start"


class Step(msgspec.Struct, frozen=True):
    """One step of a start."""

    act: Act
    object: str
    reason: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What a service does, with everything decided.

    Args:
        params: the values of the policy's parameters, in the order in which it declares them.
        backends: the backends to try for this policy, best first.
        specs: of the workers that serve; for spares see `spare_specs`.
        slots: the capacity of the maps. It leaves room to scale up, and for workers of earlier
            generations that still finish.
        hash_length: the number of positions in the hash table, enough for shares within 2 %.
        policy_reason: why `auto` became this policy; None: the user named the policy.
        others: the policies to try if no backend works for this one, best first.
        is_uncounted: whether `auto` became this policy because connections cannot be counted.
    """

    service: Service
    name: str
    binds: tuple[Bind, ...]
    policy: Policy
    params: tuple[int, ...]
    backends: tuple[BackendCandidate, ...]
    specs: tuple[WorkerSpec, ...]
    topology: Topology
    slots: int
    hash_length: int
    policy_reason: str | None = None
    others: tuple[PolicyCandidate, ...] = ()
    is_uncounted: bool = False

    @property
    def candidates(self) -> tuple[PolicyCandidate, ...]:
        """The policies to try, best first."""
        first = PolicyCandidate(
            self.policy, self.params, self.policy_reason, self.backends, self.is_uncounted
        )
        return (first, *self.others)

    def has_policy_of(self, candidate: PolicyCandidate) -> bool:
        """Whether the candidate has the same policy and parameters, and whether in both cases the
        user named the policy, or in both cases `auto` became it."""
        now = (self.policy, self.params, self.policy_reason is None)
        return now == (candidate.policy, candidate.params, candidate.reason is None)

    def with_candidates(self, candidates: Sequence[PolicyCandidate]) -> Plan:
        """This plan with other policies to try, best first."""
        first, *others = candidates
        return msgspec.structs.replace(
            self,
            policy=first.policy,
            params=first.params,
            policy_reason=first.reason,
            backends=first.backends,
            others=tuple(others),
            is_uncounted=first.is_uncounted,
        )

    @property
    def spare_specs(self) -> tuple[WorkerSpec, ...]:
        """Of the spares. Scaling the service does not change their numbers. There are none while
        there are no workers, nor if the kernel's own hash selects: it would select spares, too."""
        if not self.specs or self.backends[0].backend == KERNEL:
            return ()
        return tuple(
            WorkerSpec(MAX_WORKERS + at, self.topology.allowed, None, 1, is_spare=True)
            for at in range(self.service.spares)
        )

    @property
    def all_specs(self) -> tuple[WorkerSpec, ...]:
        """Of all workers that are started; spares come last."""
        return (*self.specs, *self.spare_specs)

    @property
    def number_in_words(self) -> str:
        """See `in_words`."""
        return in_words(len(self.specs), len(self.spare_specs))

    @property
    def at_once(self) -> int:
        """How many workers start at the same time. A command uses a CPU for its whole start: more
        commands than CPUs would only delay the first worker that becomes ready. Spares wait for
        workers."""
        return len(self.topology.allowed) if self.service.command else len(self.specs)

    @property
    def descriptors(self) -> int:
        """How many descriptors the controller needs at most: for two generations of workers at the
        same time, with some to spare."""
        return 64 + 8 * len(self.binds) + 2 * self.generation_descriptors

    @property
    def generation_descriptors(self) -> int:
        """How many descriptors one generation of workers needs."""
        return (len(self.all_specs) + 16) * (3 + len(self.binds))

    def steps(self) -> tuple[Step, ...]:
        """The steps of a start, in order."""
        candidate = self.backends[0]
        # Right before the start: another process then has little time to take the port.
        ports = tuple(Step(Act.CHECK_FREE, bind.label) for bind in self.service.binds)
        program = f"{self.policy.name} as {candidate.backend}"
        if candidate.backend == KERNEL:
            program = "no program"
        return (
            Step(Act.CLAIM, self.name),
            Step(Act.LOAD, program, "; ".join(filter(None, [self.became, candidate.reason]))),
            *ports,
            self._start(),
        )

    def _start(self) -> Step:
        if not self.service.adopts:
            return Step(Act.START, self.number_in_words, self._cpus_of_workers())
        servers = plural(self.service.instances, "server")
        return Step(Act.START, servers, "then adopt the listeners that they open")

    @property
    def became(self) -> str:
        """In words, which policy `auto` became and why; "" if the user named the policy."""
        return f"auto is {self.policy.name}, as {self.policy_reason}" if self.policy_reason else ""

    def describe(self) -> dict[str, object]:
        """The plan as `steer check --json` prints it."""
        best = self.backends[0]
        names = [param.name for param in self.policy.declared.params]
        return {
            "name": self.name,
            "policy": self.policy.name,
            "policy_asked": self.service.policy,
            "policy_reason": self.policy_reason,
            "params": dict(zip(names, self.params, strict=True)),
            "backend": best.backend,
            "backend_reason": best.reason,
            "workers": [
                {"number": spec.number, "cpus": spec.cpus, "weight": spec.weight}
                for spec in self.specs
            ],
            "spares": len(self.spare_specs),
            "steps": [
                {"act": step.act.value, "object": step.object, "reason": step.reason or None}
                for step in self.steps()
            ],
        }

    def suggested_commands(self, program: str) -> list[str]:
        """Commands that somebody who runs the demo can try next.

        Args:
            program: how steer was called.
        """
        tcp = [bind for bind in self.binds if bind.protocol == "tcp"]
        if self.service.app or self.service.command or not tcp:
            return []
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(tcp[0].address, tcp[0].address)
        host = f"[{here}]" if tcp[0].is_v6 else here
        curl = f"curl http://{host}:{tcp[0].port}/"
        if not self.policy.pinned:
            return [curl, f"{program} status"]
        # A packet from this host is received on the CPU of the client: show how to use others.
        from_cpus = [f"taskset -c {cpu} {curl}" for cpu in self.topology.allowed[:2]]
        return [*from_cpus, f"{program} status"]

    def _cpus_of_workers(self) -> str:
        if not self.policy.pinned:
            return ""
        return f"on {several('CPU', (spec.cpu for spec in self.specs))}"
