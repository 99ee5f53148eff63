"""Which members of a group may be selected now, and which CPU each of them serves."""

from __future__ import annotations

from collections.abc import Sequence

from steer.attach.affinity import Affinities
from steer.attach.group_holders import GroupHolders
from steer.attach.roster import Roster
from steer.backends.ebpf import Ebpf
from steer.config.plan import Plan
from steer.policy import layout


class Selection:
    """Tells the backend of one group whenever something has changed."""

    def __init__(self, roster: Roster, group_holders: GroupHolders, backend: Ebpf) -> None:
        self._roster = roster
        self._holders = group_holders
        self._backend = backend
        self._affinities = Affinities(roster, group_holders)
        self._now: Sequence[layout.Member] | None = None

    def update(self, plan: Plan) -> None:
        wanted = self._members(plan)
        if wanted != self._now:
            self._backend.steer(wanted)
            self._now = wanted

    def swap(self, plan: Plan) -> None:
        """Switch to the policy of another plan. Raises KernelError: nothing has changed."""
        wanted = self._members(plan)
        self._backend.swap(plan, wanted, self._holders.lend)
        self._now = wanted

    def cpu_of(self, slot: int) -> int | None:
        """The CPU that the slot serves; None: the policy goes by something else, or the slot is not
        selected."""
        return next((each.cpu for each in self._now or () if each.slot == slot), None)

    def _members(self, plan: Plan) -> Sequence[layout.Member]:
        cpus = self._affinities.cpu_of_each(plan.topology) if plan.policy.pinned else {}
        return [
            layout.Member(each.slot, plan.service.weight(each.slot), cpus.get(each.slot))
            for each in self._roster.selected
        ]
