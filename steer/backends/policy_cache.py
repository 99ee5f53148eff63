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
        """One that was current before, if no program of its can run any more; else a new one.

        A new one is in the cache only once it is current: until then the caller has to `forget` it
        if something fails.
        """
        for each in self._kept:
            if each.has_rested and each.can_become(plan):
                return each
        return self._load(plan)

    def put_in_force(self, policy: LoadedPolicy) -> None:
        """Make it the current one, and forget the one that was current longest ago if there are
        too many."""
        if policy in self._kept:
            self._kept.remove(policy)
        self._kept.append(policy)
        self.current = policy
        while len(self._kept) > _MOST:
            self.forget(self._kept[0])

    def switch_to(self, policy: LoadedPolicy) -> None:
        """The same, once the programs of `policy` are attached in place of the current one's."""
        before = self.current
        self.put_in_force(policy)
        before.left()
        if before.remembers():
            # Its flows are soon out of date, and may take much memory.
            self.forget(before)

    def forget(self, policy: LoadedPolicy) -> None:
        """Remove it from the kernel."""
        if policy in self._kept:
            self._kept.remove(policy)
        policy.close()

    def close(self) -> None:
        for each in self._kept:
            each.close()
