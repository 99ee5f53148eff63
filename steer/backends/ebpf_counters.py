"""What the eBPF programs of a service count."""

from __future__ import annotations

from collections.abc import Set

from steer.backends.base import Counts, PolicyValues
from steer.backends.connections import Counting
from steer.backends.groups import Groups
from steer.backends.policy_cache import PolicyCache
from steer.config.plan import Plan


class EbpfCounters:
    """The counters of the backend `ebpf`, see `Counters`."""

    counting: Counting
    _plan: Plan
    _groups: Groups
    _policies: PolicyCache

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        return self._groups.counts(slot, bind)

    def take_counts(self, slot: int) -> Counts | None:
        counted = self._groups.counts(slot)
        self.counting.slots.end(slot)
        self._groups.reset_counts(slot)
        return counted

    def unsteered(self) -> int | None:
        return self._groups.unsteered()

    def open(self, slot: int) -> int | None:
        return self.counting.open(slot)

    def busy(self) -> Set[int] | None:
        return self.counting.busy(self._plan.slots) if self._is_all_tcp else None

    def pulse(self) -> bytes | None:
        return self.counting.pulse(self._plan.slots) if self._is_all_tcp else None

    @property
    def _is_all_tcp(self) -> bool:
        return all(bind.protocol == "tcp" for bind in self._plan.binds)

    def policy_values(self) -> PolicyValues:
        return self._policies.current.policy_values()

    def memory_bytes(self) -> int:
        shared = sum(each.memory_bytes() for each in self.counting.maps.values())
        return self._policies.current.memory_bytes() + self._groups.memory_bytes() + shared
