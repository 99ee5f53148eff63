"""Policies in the kernel: the one in force, and those that were, to be so again without loading."""

from __future__ import annotations

from collections.abc import Callable

from steer.backends.loaded_policy import LoadedPolicy
from steer.config.plan import Plan

_KEPT = 8


class PolicyCache:
    """At most eight, the one in force among them.

    Args:
        load: puts the policy of a plan into the kernel.
    """

    def __init__(self, load: Callable[[Plan], LoadedPolicy]) -> None:
        self._load = load
        self._kept: list[LoadedPolicy] = []
        self.current: LoadedPolicy

    def for_plan(self, plan: Plan) -> LoadedPolicy:
        """One that was in force before, if its programs have ended since; else a new one, which is
        the caller's to `forget` until it is in force."""
        for each in self._kept:
            if each.has_rested and each.can_become(plan):
                return each
        return self._load(plan)

    def put_in_force(self, chosen: LoadedPolicy) -> None:
        """It is the current one; which was so longest ago goes where there are too many."""
        if chosen in self._kept:
            self._kept.remove(chosen)
        self._kept.append(chosen)
        self.current = chosen
        while len(self._kept) > _KEPT:
            self.forget(self._kept[0])

    def forget(self, chosen: LoadedPolicy) -> None:
        """Out of the kernel with it."""
        if chosen in self._kept:
            self._kept.remove(chosen)
        chosen.close()

    def close(self) -> None:
        for each in self._kept:
            each.close()
