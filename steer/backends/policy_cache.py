"""Policies that stay loaded in the kernel: the current one, and earlier ones to switch back to."""

from __future__ import annotations

from collections.abc import Callable

from steer.backends.loaded_policy import LoadedPolicy
from steer.config.plan import Plan

_MOST = 8


class PolicyCache:
    """At most eight loaded policies, including the current one.

    Args:
        load: loads the policy of a plan into the kernel.
    """

    def __init__(self, load: Callable[[Plan], LoadedPolicy]) -> None:
        self._load = load
        self._kept: list[LoadedPolicy] = []
        self.current: LoadedPolicy

    def for_plan(self, plan: Plan) -> LoadedPolicy:
        """The loaded policy for a plan: one from the cache if none of its programs still runs, else
        a new one.

        A new one enters the cache when it is put in force. If something fails before that, the
        caller has to `forget` it.
        """
        for each in self._kept:
            if each.has_rested and each.can_become(plan):
                return each
        return self._load(plan)

    def put_in_force(self, policy: LoadedPolicy) -> None:
        """Make a policy the current one. If there are too many, forget the one that was current
        longest ago."""
        if policy in self._kept:
            self._kept.remove(policy)
        self._kept.append(policy)
        self.current = policy
        while len(self._kept) > _MOST:
            self.forget(self._kept[0])

    def switch_to(self, policy: LoadedPolicy) -> None:
        """Put a policy in force whose programs have replaced those of the current policy."""
        before = self.current
        self.put_in_force(policy)
        before.left()
        if before.remembers():
            # Its flows are soon out of date, and may take much memory.
            self.forget(before)

    def forget(self, policy: LoadedPolicy) -> None:
        """Remove a policy from the kernel."""
        if policy in self._kept:
            self._kept.remove(policy)
        policy.close()

    def close(self) -> None:
        for each in self._kept:
            each.close()
