"""The configuration that results when a user asks a running service for another policy. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from steer.config.service import Service
from steer.config.sources import changed
from steer.control.commands import COMMANDS
from steer.policy.builtin import KERNEL, Policy


def with_requested(service: Service, requested: Mapping[str, Any], act: str) -> Service:
    """The configuration with the policy, parameters and weights asked for.

    Raises:
        ConfigError
    """
    keys = COMMANDS["policy"].carries
    values = {key: requested[key] for key in keys if requested.get(key) is not None}
    if values.get("policy") == KERNEL:
        values.setdefault("weights", ())  # the kernel's own hash has no weights
    return changed(service, {"params": (), **values}, act)


def with_params_of(running: Service, requested: Service, policy: Policy) -> Service:
    """The requested configuration. If the policy stays the same, parameters that the request does
    not name keep their values.

    Args:
        running: the configuration in force.
        policy: the requested policy.
    """
    if requested.policy != running.policy:
        return requested
    known = {param.name for param in policy.declared.params}
    kept = {name: value for name, value in _pairs(running.params) if name in known}
    all_of_them = {**kept, **dict(_pairs(requested.params))}
    params = tuple(f"{name}={value}" for name, value in all_of_them.items())
    return msgspec.structs.replace(requested, params=params)


def _pairs(params: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in params:
        name, _, value = text.partition("=")
        yield name, value
