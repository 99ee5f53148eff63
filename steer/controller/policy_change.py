"""Changes the policy of a running service: for the workers there are, or as part of a reload."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from steer.config import plan_change, planning
from steer.config.plan import Plan
from steer.config.service import Service
from steer.controller.refusals import log_failure
from steer.controller.requested_policy import with_params_of, with_requested
from steer.errors import KernelError, SteerError
from steer.linux import topology
from steer.linux.background import in_background
from steer.linux.log import Log
from steer.loader import find, probe
from steer.policy.builtin import BACKENDS, CUSTOM_SUFFIX, Policy

_EXIT_TIMEOUT_S, _RETRY_S = 2.0, 0.05
"""How long workers that failed may take to exit, and how often to try again meanwhile."""


class SteeredService(Protocol):
    """What a change of the policy needs of a controller."""

    @property
    def plan(self) -> Plan:
        """The plan in force."""

    def apply_policy(self, plan: Plan) -> None:
        """See `Controller.apply_policy`."""


class PolicyChange:
    """Changes the policy of one service. The caller has the turn, see `Turns.turn`."""

    def __init__(self, service: SteeredService, log: Log) -> None:
        self._service = service
        self._log = log

    @property
    def _plan(self) -> Plan:
        return self._service.plan

    async def plan_for(self, service: Service, act: str) -> Plan:
        """The plan of the running service for another configuration.

        Args:
            act: the act that errors name.

        Raises:
            SteerError: the configuration is wrong, or cannot change so while the service runs.
        """
        policy = await _prepared(service.policy)
        candidates = planning.policy_candidates(policy, service, probe.findings(), act)
        return plan_change.reloaded(self._plan, service, topology.read(), act, candidates)

    async def change(self, request: Mapping[str, Any], act: str) -> None:
        """Put the policy, parameters and weights of a request in force for all workers at once.

        Args:
            act: the act that errors name.

        Raises:
            SteerError: nothing has changed.
        """
        now = self._plan
        service = with_requested(now.service, request, act)
        try:
            policy = await _prepared(service.policy)
            service = with_params_of(now.service, service, policy)
            candidates = planning.policy_candidates(policy, service, probe.findings(), act)
            self._service.apply_policy(
                plan_change.with_candidates(now, service, candidates, topology.read(), act)
            )
        except KernelError as error:
            unchanged = f"nothing has changed: {now.policy.name} goes on"
            raise error.under(act, unchanged) from None
        self._log_policy()

    def apply_policy_of(self, other: Plan) -> Plan:
        """Put the policy of another plan in force for the workers there are.

        Returns:
            The other plan with the policy and the backend that work.

        Raises:
            SteerError: nothing has changed.
        """
        now, first = self._plan, other.candidates[0]
        if not now.has_policy_of(first) or now.backends[0].fallback:
            self._service.apply_policy(plan_change.with_policy_of(now, other, topology.read()))
            self._log_policy()
        return other.with_candidates(self._plan.candidates)

    async def restore_policy(self, before: Plan) -> None:
        """After a change that failed, put the policy from before it back in force.

        Classic BPF can be attached only when the workers that failed have exited. Until then, no
        worse backend is tried instead.

        Args:
            before: the plan in force before the change.
        """
        if self._plan.has_policy_of(before.candidates[0]):
            return
        now, end_s = topology.read(), time.monotonic() + _EXIT_TIMEOUT_S
        while time.monotonic() < end_s:
            with suppress(SteerError):
                self._service.apply_policy(plan_change.back_to(before, self._plan, now))
                return
            await asyncio.sleep(_RETRY_S)
        try:
            self._service.apply_policy(
                plan_change.back_to(before, self._plan, now, may_be_worse=True)
            )
        except SteerError as error:
            log_failure(self._log, f"select by {before.policy.name} again", error)
        else:
            self._warn_if_worse_than(before)

    def _warn_if_worse_than(self, before: Plan) -> None:
        was, now = before.backends[0].backend, self._plan.backends[0]
        if BACKENDS.index(now.backend) > BACKENDS.index(was):
            name = self._plan.policy.name
            self._log.warning("%s is on %s, not on %s: %s", name, now.backend, was, now.reason)

    def _log_policy(self) -> None:
        plan = self._plan
        self._log.info("%s on %s", plan.policy.name, plan.backends[0].backend)
        if plan.became:
            self._log.info("policy %s", plan.became)


async def _prepared(name: str) -> Policy:
    """See `find.prepare`. A custom policy is read and compiled in a thread, as that takes time."""
    if name.endswith(CUSTOM_SUFFIX):
        return await in_background(find.prepare, name)
    return find.prepare(name)
