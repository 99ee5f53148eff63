"""The two plans of a service whose command opens its listeners itself. Pure.

The servers are the workers of a pool. They get no sockets, so nothing is selected there. Their
listeners are one group, among which the policy selects as for `steer attach`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from steer.config import planning
from steer.config.candidates import BackendCandidate
from steer.config.plan import Plan
from steer.config.service import INHERIT, Service
from steer.errors import FallbackRefused
from steer.features import Finding
from steer.policy.builtin import EBPF, KERNEL, Policy, built_in
from steer.policy.cpus import Topology


def servers(service: Service) -> Service:
    """The configuration of the servers: that of the service, without a policy."""
    return msgspec.structs.replace(service, policy=KERNEL, params=(), weights=())


def listeners(
    service: Service, topology: Topology, findings: Mapping[str, Finding], policy: Policy
) -> Plan:
    """The plan of their listeners. Only eBPF can steer them.

    Args:
        findings: what the probes found, by backend.
        policy: the result of `loader.find.find`.

    Raises:
        ConfigError: a parameter of the policy is wrong.
        FallbackRefused: --strict, and they cannot be steered.
    """
    is_asked = KERNEL not in (service.backend, service.policy)
    steered = msgspec.structs.replace(
        service,
        socket=INHERIT,
        instances=1,
        reload_signal=None,
        backend=EBPF if is_asked else "auto",
        strict=is_asked,
    )
    if not is_asked:
        return unsteered(steered, topology, None)
    try:
        return planning.plan(steered, topology, findings, policy)
    except FallbackRefused as error:
        if service.strict:
            raise
        return unsteered(steered, topology, error.reason)


def shown(
    service: Service, topology: Topology, findings: Mapping[str, Finding], policy: Policy
) -> Plan:
    """The plan of any service as `steer check` and `doctor` explain it.

    Raises:
        ConfigError, FallbackRefused: see `planning.plan`.
    """
    if not service.adopts:
        return planning.plan(service, topology, findings, policy)
    plan = listeners(service, topology, findings, policy)
    return msgspec.structs.replace(plan, service=service, backends=plan.backends[:1])


def unsteered(service: Service, topology: Topology, why: str | None) -> Plan:
    """The plan of listeners that are left to the kernel's hash.

    Args:
        why: why they are not steered; None: that was asked for.
    """
    asked = msgspec.structs.replace(service, policy=KERNEL, params=(), weights=(), backend="auto")
    plan = planning.plan(asked, topology, {}, built_in(KERNEL))
    left = BackendCandidate(KERNEL, why, why is not None)
    return msgspec.structs.replace(plan, service=service, backends=(left,))
