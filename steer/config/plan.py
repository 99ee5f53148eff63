"""What `steer run` will do, in order and with reasons, before any of it is done. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec

from steer import abi
from steer.config import auto
from steer.config.address import Bind
from steer.config.auto import PolicyCandidate
from steer.config.candidates import BackendCandidate, choose
from steer.config.service import Service
from steer.errors import ConfigError
from steer.features import Finding
from steer.policy import cpus, declarations
from steer.policy.builtin import BACKENDS, CBPF, KERNEL, POLICIES, Policy, built_in
from steer.policy.cpus import Topology
from steer.values import plural, several


class WorkerSpec(msgspec.Struct, frozen=True):
    """A place for a worker; who sits there may change, the place does not.

    Args:
        cpus: those it may run on: its own under a pinning policy, else all allowed.
        cpu: the one it is pinned to, or None.
    """

    number: int
    cpus: tuple[int, ...]
    cpu: int | None
    weight: int


class Generation(msgspec.Struct, frozen=True):
    """The workers started from one configuration."""

    number: int
    plan: Plan


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
        backends: what to try, best first; see `candidates.backends`.
        params: the policy's, in the order in which it declares them.
        policy_reason: why `auto` became this policy; None if the user named it.
        is_uncounted: whether that is because open connections cannot be counted.
        others: policies to try if this one stands on none of its rungs, best first.
        slots: capacity of the maps: room to grow, and for generations that still finish.
        hash_length: positions of the hash table: enough for shares within 2 %.
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

    def is_by(self, candidate: PolicyCandidate) -> bool:
        """Whether it is the policy in force, named or not as it is now."""
        now = (self.policy, self.params, self.policy_reason is None)
        return now == (candidate.policy, candidate.params, candidate.reason is None)

    def choosing_by(self, candidates: Sequence[PolicyCandidate]) -> Plan:
        """The plan with other policies to try."""
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
    def at_once(self) -> int:
        """How many workers start at once. A command takes a CPU for all of its start: more of
        them would only make the first that is ready wait for the others."""
        return len(self.topology.allowed) if self.service.command else len(self.specs)

    @property
    def descriptors(self) -> int:
        """How many files the controller may have open at once, with room to spare and for
        a second generation beside the first."""
        return 64 + 8 * len(self.binds) + 2 * self.generation_descriptors

    @property
    def generation_descriptors(self) -> int:
        """Of these, how many are of one generation of workers."""
        return (len(self.specs) + 16) * (3 + len(self.binds))

    def steps(self) -> tuple[Step, ...]:
        candidate = self.backends[0]
        # Last before the start: the less time for somebody to slip in.
        ports = tuple(Step(Act.CHECK_FREE, bind.label) for bind in self.binds)
        program = f"{self.policy.name} as {candidate.backend}"
        if candidate.backend == KERNEL:
            program = "no program"
        return (
            Step(Act.CLAIM, self.name),
            Step(Act.LOAD, program, "; ".join(filter(None, [self.became, candidate.reason]))),
            *ports,
            Step(Act.START, plural(len(self.specs), "worker"), self._seating()),
        )

    @property
    def became(self) -> str:
        """What `auto` became and why, in words; "" if the user named the policy."""
        return f"auto is {self.policy.name}, as {self.policy_reason}" if self.policy_reason else ""

    def describe(self) -> dict[str, object]:
        """For `steer check --json`."""
        best = self.backends[0]
        return {
            "name": self.name,
            "policy": self.policy.name,
            "policy_asked": self.service.policy,
            "policy_reason": self.policy_reason,
            "params": dict(zip(_names(self.policy), self.params, strict=True)),
            "backend": best.backend,
            "backend_reason": best.reason,
            "workers": [
                {"number": spec.number, "cpus": spec.cpus, "weight": spec.weight}
                for spec in self.specs
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
        return f"on {several('CPU', (spec.cpu for spec in self.specs))}"


def plan(
    service: Service,
    topology: Topology,
    findings: Mapping[str, Finding],
    policy: Policy | None = None,
) -> Plan:
    """Decide.

    Args:
        findings: what the probes found, by backend.
        policy: as `loader.find.find` finds it; if not given, a built-in one that declares nothing.

    Raises:
        ConfigError: its parameters are not right.
        FallbackRefused: --strict, and the best rung that holds is a fallback.
    """
    policy = policy or built_in(service.policy)
    act = f"--policy {policy.name}"
    first, *others = auto.candidates(policy, service, findings, act)
    workers = len(topology.allowed) if service.workers == "auto" else service.workers
    choose(first.backends[0], service.strict)
    return Plan(
        service,
        service.service_name,
        service.binds,
        first.policy,
        first.params,
        first.backends,
        _worker_specs(service, first.policy, workers, topology),
        topology,
        min(abi.MAX_SLOTS, max(_SLOTS_AT_LEAST, 2 * _two_generations(workers))),
        _hash_length(workers, [service.weight(number) for number in range(workers)]),
        first.reason,
        tuple(others),
    )


_SLOTS_AT_LEAST = 256
FIXED = ("bind", "backend", "strict", "name", "pid", "control_socket")
"""Keys that only a new start can change: sockets and files are made once."""


def again(
    running: Plan,
    service: Service,
    topology: Topology,
    act: str = "",
    candidates: Sequence[PolicyCandidate] = (),
) -> Plan:
    """The plan for a running service that is to become `service`.

    Args:
        act: what that is for, for errors; a reload.
        candidates: policies to try, best first; none: the one it has, on the rung it stands on.

    Raises:
        ConfigError: something in it cannot change while the service runs.
    """
    act = act or f"reload {running.name}"
    for key in FIXED:
        old, new = getattr(running.service, key), getattr(service, key)
        if old != new:
            raise ConfigError(
                act,
                f"{key} is {_text(old)} and would be {_text(new)}, which cannot change live",
                f"stop and start it, or put {key} back",
            )
    workers = len(topology.allowed) if service.workers == "auto" else service.workers
    if not candidates:
        params = declarations.values(running.policy.declared, service.params, act)
        as_it_is = msgspec.structs.replace(running, params=params)
        candidates = as_it_is.candidates
    else:
        candidates = _steered(running, candidates, act, asked_for_is_enough=True)
    chosen = _choosing_by(running, service, candidates, workers)
    return _with_workers(chosen, service, topology, workers)


def choosing_by(
    running: Plan,
    service: Service,
    candidates: Sequence[PolicyCandidate],
    topology: Topology,
    act: str,
) -> Plan:
    """The plan for a running service with another policy, parameters or weights.

    Args:
        candidates: policies to try, best first.

    Raises:
        ConfigError: none of them would be steered.
    """
    workers = len(running.specs)
    candidates = _steered(running, candidates, act, asked_for_is_enough=False)
    return _with_workers(
        _choosing_by(running, service, candidates, workers), service, topology, workers
    )


def with_policy_of(running: Plan, other: Plan, topology: Topology) -> Plan:
    """The plan for a running service with the policies to try, and parameters, of another plan."""
    by = {"policy": other.service.policy, "params": other.service.params}
    service = msgspec.structs.replace(running.service, **by)
    workers = len(running.specs)
    chosen = _choosing_by(running, service, other.candidates, workers)
    return _with_workers(chosen, service, topology, workers)


def back_to(before: Plan, running: Plan, topology: Topology, lower: bool = False) -> Plan:
    """The plan for a running service with the policy that was in force before a change that has
    failed: on the better of the two backends, as the change may have found a better one.

    Args:
        lower: whether a backend will do that is worse than the one before the change.
    """
    (old,) = before.candidates
    backends = {each.backend: each for each in (*running.backends, *before.backends)}
    lowest = None if lower else BACKENDS.index(before.backends[0].backend) + 1
    may_be = tuple(
        backends[name]
        for name in BACKENDS[:lowest]
        if name in backends and name in old.policy.backends
    )
    plan = before.choosing_by([msgspec.structs.replace(old, backends=may_be)])
    return with_policy_of(running, plan, topology)


def _choosing_by(
    running: Plan, service: Service, candidates: Sequence[PolicyCandidate], workers: int
) -> Plan:
    weights = [service.weight(number) for number in range(workers)]
    hash_length = max(running.hash_length, _positions(weights or [1]))
    return msgspec.structs.replace(running.choosing_by(candidates), hash_length=hash_length)


def _steered(
    running: Plan, candidates: Sequence[PolicyCandidate], act: str, *, asked_for_is_enough: bool
) -> Sequence[PolicyCandidate]:
    """The candidates without rungs on which they would steer nothing. A start falls that low, as
    a service that answers is better than none; a service that runs is not changed to that.

    Args:
        asked_for_is_enough: whether the kernel's own hash will do if that is the backend asked for.

    Raises:
        ConfigError: nothing is left.
    """

    def is_of_use(policy: PolicyCandidate, candidate: BackendCandidate) -> bool:
        if candidate.backend != KERNEL or policy.policy.source is None:
            return True
        is_there = running.backends[0].backend == KERNEL and (
            (policy.policy, policy.params) == (running.policy, running.params)
        )
        return asked_for_is_enough and (is_there or not candidate.fallback)

    kept = [
        msgspec.structs.replace(each, backends=backends)
        for each in candidates
        if (
            backends := tuple(
                candidate for candidate in each.backends if is_of_use(each, candidate)
            )
        )
    ]
    if not kept:
        last = candidates[-1]
        cause = f"{last.policy.name} would steer nothing: {last.backends[-1].reason}"
        raise ConfigError(act, cause, _what_would(running))
    return kept


def _what_would(running: Plan) -> str:
    if running.backends[0].backend != CBPF:
        return "see `steer doctor`"
    others = (each for each in POLICIES.values() if not each.source or each.assemble)
    return f"allowed: {', '.join(each.name for each in others)}"


def _names(policy: Policy) -> list[str]:
    return [param.name for param in policy.declared.params]


def scaled(running: Plan, workers: int, topology: Topology) -> Plan:
    """The plan with another number of workers; with 0 for a while, it is configured as before.

    Raises:
        ConfigError: so many cannot be.
    """
    service = running.service
    if workers:
        service = msgspec.structs.replace(service, workers=workers)
    return _with_workers(running, service, topology, workers)


def on(running: Plan, topology: Topology) -> Plan:
    """The plan for a running service on other CPUs: as many workers, seated anew."""
    return _with_workers(running, running.service, topology, len(running.specs))


def _with_workers(running: Plan, service: Service, topology: Topology, workers: int) -> Plan:
    if _two_generations(workers) > running.slots:
        raise ConfigError(
            f"run {plural(workers, 'worker')} in {running.name}",
            f"it was started with room for {running.slots // 2}, each of which can be replaced",
            "start it anew with so many",
        )
    specs = _worker_specs(service, running.policy, workers, topology)
    return msgspec.structs.replace(running, service=service, specs=specs, topology=topology)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def _two_generations(workers: int) -> int:
    return 1 << (2 * workers - 1).bit_length() if workers else 0


def _hash_length(workers: int, weights: Sequence[int]) -> int:
    return min(abi.ENTRIES, max(64 * max(64, _two_generations(workers)), _positions(weights)))


def _positions(weights: Sequence[int]) -> int:
    """Fifty for the lightest, so that rounding is a hundredth of its share."""
    return min(abi.ENTRIES, 50 * -(-sum(weights) // min(weights)))


def _worker_specs(
    service: Service, policy: Policy, workers: int, topology: Topology
) -> tuple[WorkerSpec, ...]:
    if not policy.pinned:
        return tuple(
            WorkerSpec(number, topology.allowed, None, service.weight(number))
            for number in range(workers)
        )
    return tuple(
        WorkerSpec(number, (cpu,), cpu, service.weight(number))
        for number, cpu in enumerate(cpus.cpu_of_each(workers, topology))
    )
