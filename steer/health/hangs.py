"""One worker's state seen from outside: hung, at capacity, or fine again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from functools import partial

from steer.backends.shortfalls import STILL_SELECTED
from steer.health import capacity
from steer.health.evidence import CloserLook
from steer.linux.activity import activity, is_stopped
from steer.linux.waiting import Seen
from steer.policy.builtin import KERNEL
from steer.sockets import listeners
from steer.workers.handle import WorkerHandle, waits
from steer.workers.hang import History, Look, Verdict
from steer.workers.lifecycle import Event, State
from steer.workers.pool import WorkerPool
from steer.workers.process import WorkerProcess
from steer.workers.spares import spare_for
from steer.workers.visibility import QUEUES

_REPLACE_AGAIN_S = 30.0
"""A replacement that has not come after this time is requested again."""


class Hangs:
    """Finds workers that are hung or at capacity, and those that have recovered.

    Args:
        pool: gets the events.
        replace: requests a replacement for a hung worker.
    """

    def __init__(self, pool: WorkerPool, replace: Callable[[WorkerHandle], None]) -> None:
        self._pool = pool
        self._replace = replace
        self._histories: dict[int, History] = {}
        self._closer = CloserLook()
        self._retiring_numbers: Collection[int] = ()

    @property
    def has_histories(self) -> bool:
        """Whether a worker was judged that is still there."""
        return bool(self._histories)

    def forget(self) -> None:
        """Judge every worker from now on only by what is seen from now on."""
        self._histories.clear()

    def begin(self, workers: Collection[WorkerHandle]) -> None:
        """A new round of looks, at these workers, begins."""
        self._retiring_numbers = {worker.spec.number for worker in workers if worker.was_hung}
        pids = {worker.process.pid for worker in workers if worker.process}
        self._histories = {pid: each for pid, each in self._histories.items() if pid in pids}

    def look_at(self, worker: WorkerHandle) -> bool:
        """Look at a worker. Returns whether to look again even if it has no connections then."""
        if worker.process and worker.state is State.READY:
            self._look_at_ready(worker, worker.process)
            is_limited = worker.at_capacity or worker.excluded
            return bool(worker.queued) or is_limited or worker.is_hung
        if worker.process and worker.is_hung:
            self._look_at_hung(worker, worker.process)
        elif worker.was_hung:
            self._pool.migration.migrate(worker)
        return worker.is_hung or worker.was_hung

    def _look_at_ready(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        if is_silent(worker, self._pool.clock.now_s()):
            self._set_hung(worker, process, "it missed its watchdog")
        elif worker.service.hang_timeout:
            verdict = self._judge(worker, process)
            if verdict is Verdict.HUNG:
                accepts_none = "its accept queue is not draining"
                serves_none = "it serves none of the connections it has accepted"
                self._set_hung(worker, process, accepts_none if worker.queued else serves_none)
            elif worker.at_capacity != (verdict is Verdict.AT_CAPACITY):
                capacity.set_at_capacity(worker, verdict is Verdict.AT_CAPACITY, self._pool.log)

    def _set_hung(self, worker: WorkerHandle, process: WorkerProcess, why: str) -> None:
        is_last = worker.is_in_service and not self._others_can_serve(worker)
        if is_last or not worker.is_settled:
            return
        if self._pool.backend.name == KERNEL:
            why = f"{why}; {STILL_SELECTED}"
        self._pool.log.warning("worker %d is hung: %s", worker.slot, why)
        worker.has_acted()
        worker.at_capacity = worker.excluded = worker.acted_since_hung = False
        self._histories.pop(process.pid, None)
        self._pool.report(worker, Event.STUCK)
        self._replace_if_due(worker)

    def _others_can_serve(self, worker: WorkerHandle) -> bool:
        """Whether the worker is not the last: connections could go nowhere else then."""
        workers = self._pool.workers
        others_serve = any(each.serves for each in workers if each is not worker)
        return others_serve or spare_for(worker, workers) is not None

    # The verdict on a worker.

    def _judge(self, worker: WorkerHandle, process: WorkerProcess) -> Verdict:
        now_s, open_now = self._pool.clock.now_s(), self._pool.backend.open(worker.slot)
        history = self._histories.setdefault(process.pid, History(worker.service.hang_timeout))
        look_closer = partial(self._closer.look, worker, process, open_now)
        looks = self._looks(worker, process)
        worker.queued = sum(look.queued for look in looks.values())
        if worker.at_capacity:
            # An empty queue proves nothing, as it may have been migrated.
            has_room = self._has_room(worker, process)
            return Verdict.FINE if has_room else history.judge_at_capacity(now_s, look_closer)
        return history.judge(now_s, looks, open_now, look_closer)

    def _has_room(self, worker: WorkerHandle, process: WorkerProcess) -> bool:
        """Whether a worker that was at capacity waits for connections again."""
        seen = waits(process)
        return seen is Seen.YES or (seen is Seen.UNKNOWN and self._is_back(worker, process))

    def _looks(self, worker: WorkerHandle, process: WorkerProcess) -> dict[int, Look]:
        found = self._pool.queues.of(process)
        if found is None:
            self._pool.visibility.refused(QUEUES, process)
            return {}
        if not any(each.queued for each in found.values()):
            return {at: Look(0) for at in found}
        ticks = activity(process.pid, among=worker.accepting_pids)
        return {at: self._look(worker, at, each, ticks) for at, each in found.items()}

    def _look(self, worker: WorkerHandle, at: int, found: listeners.Waiting, activity: int) -> Look:
        counts = self._pool.backend.counts(worker.slot, at)
        is_counted = counts and worker.binds[at].protocol == "tcp"
        taken = counts.selected - found.queued if counts and is_counted else None
        return Look(found.queued, found.queued >= found.limit, taken, activity)

    # Workers that are hung.

    def _look_at_hung(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        if self._is_back(worker, process):
            self._pool.log.info("worker %d is no longer hung", worker.slot)
            self._pool.report(worker, Event.BACK)
        else:
            # Not if it has recovered: it may be accepting, and migration shuts its listener down.
            self._pool.migration.migrate(worker)
            self._replace_if_due(worker)

    def _is_back(self, worker: WorkerHandle, process: WorkerProcess) -> bool:
        """Whether it has done something, and waits for more."""
        if is_silent(worker, self._pool.clock.now_s()):
            return False
        # A look may find that it has acted, but does not wait yet. It rests after that, as its
        # queue was migrated, so that the next look would not see it act.
        worker.acted_since_hung = worker.has_acted() or (worker.acted_since_hung and worker.is_hung)
        if not worker.acted_since_hung or is_stopped(process.pid):
            return False
        return waits(process) is not Seen.NO

    def _replace_if_due(self, worker: WorkerHandle) -> None:
        """Request one replacement for each spec at a time. If every request of clients takes
        long, replacements would pile up otherwise."""
        if worker.service.hang != "replace":
            return
        now_s = self._pool.clock.now_s()
        is_retiring = worker.spec.number in self._retiring_numbers
        if now_s >= worker.replace_not_before_s and not is_retiring:
            worker.replace_not_before_s = now_s + _REPLACE_AGAIN_S
            self._replace(worker)


def is_silent(worker: WorkerHandle, now_s: float) -> bool:
    """Whether it missed its watchdog, or asked to be treated so (WATCHDOG=trigger)."""
    limit_s = worker.service.watchdog or math.inf
    return now_s - worker.heartbeat_s >= limit_s


def silent(workers: Iterable[WorkerHandle], now_s: float) -> set[WorkerHandle]:
    """The workers that are silent."""
    return {worker for worker in workers if is_silent(worker, now_s)}
