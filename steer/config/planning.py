"""Makes the plan of a service: from its configuration, its policy and the results of the probes.

Pure: the caller reads the policy and runs the probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from steer import abi
from steer.config.candidates import (
    BackendCandidate,
    PolicyCandidate,
    backend_candidates,
    refuse_fallback,
    with_reason,
)
from steer.config.plan import Plan, WorkerSpec
from steer.config.service import Service
from steer.errors import ConfigError
from steer.features import Finding
from steer.policy import cpus, declarations
from steer.policy.builtin import AUTO, EBPF, Policy, built_in
from steer.policy.cpus import Topology

DATAGRAMS = "the datagrams of a flow have to stay together"
COUNTED = "open connections are counted"
_SLOTS_AT_LEAST = 256


def plan(
    service: Service,
    topology: Topology,
    findings: Mapping[str, Finding],
    policy: Policy | None = None,
) -> Plan:
    """Make the plan of a service that is about to start.

    Args:
        findings: what the probes found, by backend.
        policy: the result of `loader.find.find`; None: the built-in policy, without what its file
            declares.

    Raises:
        ConfigError: a parameter of the policy is wrong.
        FallbackRefused: --strict, and the best backend that can work is a fallback.
    """
    policy = policy or built_in(service.policy)
    act = f"policy {policy.name}"
    first, *others = policy_candidates(policy, service, findings, act)
    workers = service.processes(len(topology.allowed))
    refuse_fallback(first.backends[0], service.strict)
    return Plan(
        service,
        service.service_name,
        service.given_binds,
        first.policy,
        first.params,
        first.backends,
        worker_specs(service, first.policy, workers, topology),
        topology,
        min(abi.MAX_SLOTS, max(_SLOTS_AT_LEAST, 2 * slots_for(workers + service.spares))),
        _hash_length(workers, [service.weight(number) for number in range(workers)]),
        first.reason,
        tuple(others),
    )


def policy_candidates(
    policy: Policy, service: Service, findings: Mapping[str, Finding], act: str
) -> tuple[PolicyCandidate, ...]:
    """The policies to try, best first: `auto` may have several, any other policy is the only one.

    Args:
        policy: the result of `loader.find.find`.
        findings: what the probes found, by backend.
        act: the act that errors name.

    Raises:
        ConfigError: a parameter is wrong, or a parameter is given for `auto`.
    """
    if not policy.candidates:
        return (_named(policy, service, findings, act),)
    if service.params:
        cause = f"parameters are of one policy, and {AUTO} may become another"
        raise ConfigError(act, cause, "name the policy, see `steer policies`")
    by_load, by_flow = policy.candidates
    last = _candidate(by_flow, service, findings, "")
    if any(bind.protocol == "udp" for bind in service.binds):
        return (with_reason(last, DATAGRAMS),)
    first = _candidate(by_load, service, findings, COUNTED)
    countable = tuple(each for each in first.backends if each.backend == EBPF)
    if not countable:
        return (with_reason(last, f"{by_load.name} needs {EBPF}"),)
    return (msgspec.structs.replace(first, backends=countable), last)


def _named(
    policy: Policy, service: Service, findings: Mapping[str, Finding], act: str
) -> PolicyCandidate:
    params: tuple[int, ...] = ()
    if policy.problem is None:
        params = declarations.values(policy.declared, service.params, act)
    backends = tuple(backend_candidates(policy, service.backend, findings))
    return PolicyCandidate(policy, params, None, backends)


def _candidate(
    policy: Policy, service: Service, findings: Mapping[str, Finding], reason: str
) -> PolicyCandidate:
    """A policy that `auto` may become. `auto` takes no parameters, so each has its default."""
    params = declarations.values(policy.declared, (), "")
    backends: Sequence[BackendCandidate] = backend_candidates(policy, service.backend, findings)
    return PolicyCandidate(policy, params, reason, tuple(backends))


def slots_for(workers: int) -> int:
    """How many slots this number of workers needs while a reload replaces all of them."""
    return 1 << (2 * workers - 1).bit_length() if workers else 0


def _hash_length(workers: int, weights: Sequence[int]) -> int:
    return min(abi.ENTRIES, max(64 * max(64, slots_for(workers)), hash_positions(weights)))


def hash_positions(weights: Sequence[int]) -> int:
    """How many positions the hash table needs for these weights: 50 for the lowest weight, so that
    rounding changes the share of that worker by 1 % at most."""
    return min(abi.ENTRIES, 50 * -(-sum(weights) // min(weights)))


def worker_specs(
    service: Service, policy: Policy, workers: int, topology: Topology
) -> tuple[WorkerSpec, ...]:
    """What each worker is to be. Only a pinning policy gives each worker a CPU of its own."""
    if not policy.pinned:
        return tuple(
            WorkerSpec(number, topology.allowed, None, service.weight(number))
            for number in range(workers)
        )
    return tuple(
        WorkerSpec(number, (cpu,), cpu, service.weight(number))
        for number, cpu in enumerate(cpus.cpu_of_each(workers, topology))
    )
