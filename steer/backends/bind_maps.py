"""The maps that one bind has in the kernel, whatever the policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from steer import abi
from steer.backends import backup
from steer.config.plan import Plan
from steer.loader import bpf_maps


class BindMaps:
    """One bind's own maps; whatever the policy, they stay.

    The turn counters of the CPUs start apart: were they together, the first
    connections of every CPU would all go to the first slot.
    """

    def __init__(self, plan: Plan) -> None:
        cpus = len(plan.topology.possible)
        with ExitStack() as undo:
            self.maps = {
                name: undo.enter_context(bpf_maps.Map(name, plan.slots + backup.COUNT))
                for name in ("sockets", "counts", "cpus")
            }
            self.sockets, self.counts, self.cpus = self.maps.values()
            starts = (len(plan.specs) * cpu // cpus for cpu in range(cpus))
            self.cpus.put(0, b"".join(abi.CPU.pack(at << 32 | at, _seed(), 0, 0) for at in starts))
            self.close = undo.pop_all().close

    def descriptors(self) -> Sequence[int]:
        return [each.fileno() for each in self.maps.values()]

    def receive(self, fds: Sequence[int]) -> None:
        """Go on with the maps of one that is gone."""
        for each, fd in zip(self.maps.values(), fds, strict=True):
            each.become(fd)


def _seed() -> int:
    """For steer_random(), which never leaves 0."""
    return int.from_bytes(os.urandom(4)) | 1
