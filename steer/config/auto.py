"""Which policies a service may be steered by, best first: one, or under `auto` several. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from steer.config.candidates import BackendCandidate, backend_candidates
from steer.config.service import Service
from steer.errors import ConfigError, KernelError, Uncounted
from steer.features import Finding
from steer.policy import declarations
from steer.policy.builtin import AUTO, EBPF, Policy


class PolicyCandidate(msgspec.Struct, frozen=True):
    """A policy to try.

    Args:
        params: in the order in which the policy declares them.
        reason: why `auto` becomes this one; None if the user named the policy.
        backends: what it may stand on, best first. If it stands on none, the next candidate's turn
            has come; the last one stands on the kernel's own hash if need be.
        is_uncounted: whether `auto` becomes it because open connections cannot be counted.
    """

    policy: Policy
    params: tuple[int, ...]
    reason: str | None
    backends: tuple[BackendCandidate, ...]
    is_uncounted: bool = False


DATAGRAMS = "the datagrams of a flow have to stay together"
COUNTED = "open connections are counted"


def candidates(
    policy: Policy, service: Service, findings: Mapping[str, Finding], act: str
) -> tuple[PolicyCandidate, ...]:
    """The policies to try; at least one.

    Args:
        policy: as `loader.find.find` finds it.
        findings: what the probes found, by backend.
        act: what that is for, for errors.

    Raises:
        ConfigError: a parameter is not right, or given for `auto`.
    """
    if not policy.candidates:
        return (_named(policy, service, findings, act),)
    if service.params:
        cause = f"parameters are of one policy, and {AUTO} may become another"
        raise ConfigError(act, cause, "name the policy, see `steer policies`")
    by_load, by_flow = policy.candidates
    last = _candidate(by_flow, service, findings, "")
    if any(bind.protocol == "udp" for bind in service.binds):
        return (because(last, DATAGRAMS),)
    first = _candidate(by_load, service, findings, COUNTED)
    countable = tuple(each for each in first.backends if each.backend == EBPF)
    if not countable:
        return (because(last, f"{by_load.name} needs {EBPF}"),)
    return (msgspec.structs.replace(first, backends=countable), last)


def instead(candidate: PolicyCandidate, of: Policy, error: KernelError) -> PolicyCandidate:
    """The candidate, as `auto` becomes it because the policy `of` met an error."""
    is_uncounted = isinstance(error, Uncounted)
    why_not = str(error) if is_uncounted else f"{of.name}: {error}"
    return msgspec.structs.replace(candidate, reason=why_not, is_uncounted=is_uncounted)


def because(candidate: PolicyCandidate, reason: str) -> PolicyCandidate:
    """The candidate, with why it is this one."""
    return msgspec.structs.replace(candidate, reason=reason)


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
    """One of those of `auto`, which takes no parameters."""
    params = declarations.values(policy.declared, (), "")
    backends: Sequence[BackendCandidate] = backend_candidates(policy, service.backend, findings)
    return PolicyCandidate(policy, params, reason, tuple(backends))
