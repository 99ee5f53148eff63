"""Switches running workers to another policy, other parameters, weights or CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from steer.backends.base import Backend
from steer.config.plan import Generation, Plan
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle, WorkerHandles
from steer.workers.selection import Selection


class PolicySwitch:
    """Switches the selection, then gives workers the specs of the new plan."""

    def __init__(self, workers: WorkerHandles, selection: Selection, entries: GuardEntries) -> None:
        self._workers = workers
        self._selection = selection
        self._entries = entries

    def switch(
        self, now: Generation, plan: Plan, backend: Backend | None = None
    ) -> tuple[Generation, Sequence[WorkerHandle]]:
        """Select by the policy of this plan from now on.

        Args:
            now: the generation in force.
            backend: another backend, which has no socket yet; None: the backend stays.

        Returns:
            The same generation with the new plan, and the workers to pin to other CPUs.

        Raises:
            KernelError: nothing has changed.
        """
        specs = {spec.number: spec for spec in plan.all_specs}
        moves = {
            worker.slot: specs.get(worker.spec.number, worker.spec) for worker in self._workers
        }
        members = [worker.member(moves[worker.slot]) for worker in self._workers if worker.serves]
        self._selection.switch_policy(plan, members, backend)
        then = Generation(now.number, plan)
        for worker in self._workers:
            if worker.generation.number == then.number:
                worker.generation = then
        moved = [worker for worker in self._workers if worker.spec != moves[worker.slot]]
        unpinned = [worker for worker in moved if worker.change_spec(moves[worker.slot])]
        self._entries.save(moved, look=False)
        self._selection.save()
        return then, unpinned
