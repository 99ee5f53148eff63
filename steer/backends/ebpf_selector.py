"""Which workers the eBPF programs of a service select, and by which policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from steer import abi
from steer.backends import groups
from steer.backends.anchors import Anchors
from steer.backends.backup import BackupListeners, Lend
from steer.backends.connections import Counting
from steer.backends.groups import Groups
from steer.backends.loaded_policy import LoadedPolicy
from steer.backends.policy_cache import PolicyCache
from steer.config.plan import Plan
from steer.policy import layout
from steer.policy.layout import Layout, Member
from steer.sockets import group_program


class EbpfSelector:
    """What the backend `ebpf` selects, see `Selector`."""

    counting: Counting
    backup: BackupListeners
    _plan: Plan
    _groups: Groups
    _policies: PolicyCache
    _anchors: Anchors
    _slots: set[int]
    _is_serving: bool

    @property
    def _policy(self) -> LoadedPolicy:
        return self._policies.current

    @property
    def write_waiting(self) -> Callable[[int, int], None] | None:
        is_told = self._plan.policy.reads_load and self.counting.why_not
        return self.counting.slots.set_open if is_told else None

    def steer(self, members: Sequence[Member]) -> None:
        if members and not self._is_serving:
            # Flows that came meanwhile are remembered at the backup listeners, or nowhere.
            self._forget_flows(self.backup.slots[0])
            self._forget_flows(abi.NO_SLOT)
        self._policy.steer(members, self._layout_without_workers())
        self._is_serving = bool(members)

    def _layout_without_workers(self) -> Layout:
        """The table while no worker can be selected."""
        slot = self.backup.slots[0] if self.backup.sockets else abi.NO_SLOT
        return layout.uniform(slot, sorted(self._slots) if self._anchors else ())

    def _spread_datagrams(self) -> None:
        """While no worker can be selected, let datagrams wait at workers that start. The kernel's
        hash would do that, too, but it would also select anchors."""
        if self._anchors and not self._is_serving:
            self._policy.spare(sorted(self._slots))

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        if self._policy.can_become(plan):
            self._plan = plan
            self._policy.become(plan)
            self.steer(members)
            return
        before, fresh = self._policy, self._policies.for_plan(plan)
        try:
            fresh.follow(before)
            fresh.become(plan)
            fresh.steer(members, self._layout_without_workers())
            with self.backup.or_lent(lend) as sockets:
                groups.switch_programs(sockets, fresh.programs, before.programs)
            fresh.begin()
        except BaseException:
            self._policies.forget(fresh)
            raise
        self._plan = plan
        self._policies.switch_to(fresh)

    def reattach(self, lend: Lend) -> None:
        with self.backup.or_lent(lend) as sockets:
            for bind, sock in sockets.items():
                with suppress(group_program.NoMember):
                    groups.attach_through(sock.fileno(), self._policy.programs[bind])

    def detach(self, lend: Lend) -> None:
        with lend() as lent:
            # First, as the kernel's hash would select these sockets as well.
            self.backup.shut_down()
            self._anchors.close()
            for sock in lent.values():
                group_program.detach(sock.fileno())
        # The maps may live on for a while, and a socket can be in one sockarray only.
        self._groups.remove(range(self.backup.slots.stop))

    def grace_period(self) -> tuple[object, int] | None:
        publication = self._policy.grace_period()
        return None if publication is None else (self._policy, publication)

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        policy, number = publication
        if policy is self._policy:
            self._policy.grace_period_ended(number)

    @property
    def forget_flows(self) -> Callable[[int], None] | None:
        return self._forget_flows if self._policy.remembers() else None

    def _forget_flows(self, slot: int) -> None:
        self.counting.slots.forget_flows(slot)
