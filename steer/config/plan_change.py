"""Makes a new plan for a running service: for a reload, another policy, or other workers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from steer.config.candidates import BackendCandidate, PolicyCandidate
from steer.config.plan import Plan, in_words
from steer.config.planning import hash_positions, slots_for, worker_specs
from steer.config.service import Service
from steer.errors import ConfigError
from steer.policy import declarations
from steer.policy.builtin import BACKENDS, CBPF, KERNEL, POLICIES
from steer.policy.cpus import Topology

FIXED = ("socket", "bind", "backend", "strict", "name", "pid", "control_socket")
"""Keys that cannot change while a service runs, as sockets and files are made once."""


def reloaded(
    running: Plan,
    service: Service,
    topology: Topology,
    act: str = "",
    candidates: Sequence[PolicyCandidate] = (),
) -> Plan:
    """The plan of a running service for another configuration.

    Args:
        act: the act that errors name; "": a reload.
        candidates: the policies to try, best first; none: the policy and backend in force.

    Raises:
        ConfigError: a key has changed that cannot change while the service runs.
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
    workers = service.processes(len(topology.allowed))
    if not candidates:
        params = declarations.values(running.policy.declared, service.params, act)
        candidates = msgspec.structs.replace(running, params=params).candidates
    else:
        candidates = _without_kernel_hash(running, candidates, act, may_be_kernel=True)
    plan = _with_candidates(running, service, candidates, workers)
    return _with_workers(plan, service, topology, workers)


def with_candidates(
    running: Plan,
    service: Service,
    candidates: Sequence[PolicyCandidate],
    topology: Topology,
    act: str,
) -> Plan:
    """The plan of a running service with another policy, other parameters or other weights.

    Args:
        candidates: the policies to try, best first.
        act: the act that errors name.

    Raises:
        ConfigError: the kernel's own hash would replace each of the policies.
    """
    workers = len(running.specs)
    candidates = _without_kernel_hash(running, candidates, act, may_be_kernel=False)
    plan = _with_candidates(running, service, candidates, workers)
    return _with_workers(plan, service, topology, workers)


def with_policy_of(running: Plan, other: Plan, topology: Topology) -> Plan:
    """The plan of a running service with the policies and parameters of another plan."""
    policy_of_other = {"policy": other.service.policy, "params": other.service.params}
    service = msgspec.structs.replace(running.service, **policy_of_other)
    workers = len(running.specs)
    plan = _with_candidates(running, service, other.candidates, workers)
    return _with_workers(plan, service, topology, workers)


def back_to(before: Plan, running: Plan, topology: Topology, may_be_worse: bool = False) -> Plan:
    """The plan of a running service with the policy from before a change that failed.

    The change may have found a better backend, which is then tried first.

    Args:
        before: the plan in force before the change.
        may_be_worse: whether to try backends that are worse than the one before the change.
    """
    (old,) = before.candidates
    backends = {each.backend: each for each in (*running.backends, *before.backends)}
    end = None if may_be_worse else BACKENDS.index(before.backends[0].backend) + 1
    to_try = tuple(
        backends[name]
        for name in BACKENDS[:end]
        if name in backends and name in old.policy.backends
    )
    plan = before.with_candidates([msgspec.structs.replace(old, backends=to_try)])
    return with_policy_of(running, plan, topology)


def _with_candidates(
    running: Plan, service: Service, candidates: Sequence[PolicyCandidate], workers: int
) -> Plan:
    weights = [service.weight(number) for number in range(workers)]
    hash_length = max(running.hash_length, hash_positions(weights or [1]))
    return msgspec.structs.replace(running.with_candidates(candidates), hash_length=hash_length)


def _without_kernel_hash(
    running: Plan, candidates: Sequence[PolicyCandidate], act: str, *, may_be_kernel: bool
) -> Sequence[PolicyCandidate]:
    """The candidates without the kernel's own hash in place of a policy.

    A start may fall back to the kernel's own hash, as a service that answers is better than none.
    A running service keeps the policy in force instead.

    Args:
        may_be_kernel: whether the kernel's own hash is allowed if the user asked for that backend,
            or if it is in force.

    Raises:
        ConfigError: no candidate is left.
    """

    def steers(policy: PolicyCandidate, backend: BackendCandidate) -> bool:
        if backend.backend != KERNEL or policy.policy.source is None:
            return True
        is_in_force = running.backends[0].backend == KERNEL and (
            (policy.policy, policy.params) == (running.policy, running.params)
        )
        return may_be_kernel and (is_in_force or not backend.fallback)

    kept = [
        msgspec.structs.replace(each, backends=backends)
        for each in candidates
        if (backends := tuple(backend for backend in each.backends if steers(each, backend)))
    ]
    if not kept:
        last = candidates[-1]
        cause = f"{last.policy.name} would steer nothing: {last.backends[-1].reason}"
        raise ConfigError(act, cause, _cure(running))
    return kept


def _cure(running: Plan) -> str:
    if running.backends[0].backend != CBPF:
        return "see `steer doctor`"
    others = (each for each in POLICIES.values() if not each.source or each.assemble)
    return f"allowed: {', '.join(each.name for each in others)}"


def scaled(running: Plan, workers: int, topology: Topology) -> Plan:
    """The plan of a running service with another number of workers.

    With 0 workers, the configuration keeps its number: the service is to have workers again.

    Raises:
        ConfigError: the maps have too few slots for this number of workers.
    """
    service = running.service
    if workers:
        key = "instances" if service.adopts else "workers"
        service = msgspec.structs.replace(service, **{key: workers})
    return _with_workers(running, service, topology, workers)


def on_cpus(running: Plan, topology: Topology) -> Plan:
    """The plan of a running service on other CPUs, with the same number of workers."""
    return _with_workers(running, running.service, topology, len(running.specs))


def _with_workers(running: Plan, service: Service, topology: Topology, workers: int) -> Plan:
    if slots_for(workers + service.spares) > running.slots:
        wanted = in_words(workers, service.spares)
        raise ConfigError(
            f"run {wanted} in {running.name}",
            f"it was started with capacity for {running.slots // 2}",
            f"stop it, and start it with {wanted}",
        )
    specs = worker_specs(service, running.policy, workers, topology)
    return msgspec.structs.replace(running, service=service, specs=specs, topology=topology)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
