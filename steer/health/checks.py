"""Looks at workers from outside: whether they got ready, take what waits, came back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from steer.backends.shortfalls import CHOSEN_ALL_THE_SAME
from steer.health import capacity
from steer.health.evidence import Closer
from steer.health.load import LoadSampler, tables
from steer.health.readiness import Readiness
from steer.linux.activity import activity, is_stopped
from steer.linux.waiting import Seen
from steer.policy.builtin import KERNEL
from steer.sockets import listeners
from steer.workers.handle import WorkerHandle, waits
from steer.workers.hang import History, Look, Verdict
from steer.workers.lifecycle import Event, State
from steer.workers.looks import TOGETHER_S, on_the_beat
from steer.workers.pool import WorkerPool
from steer.workers.process import WorkerProcess
from steer.workers.queues import Table, unchanged
from steer.workers.visibility import QUEUES

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_LOOKING_S = _BREAK_S = 0.005
"""Looks at workers go on no longer than that, and then in another turn of the loop."""
_LOOKS = 4
"""In one --hang-timeout while something is under way; more while something waits."""
_RESTING_LOOKS = 2
"""While nothing is: whatever begins then has all of its time from the look that sees it."""
_SELDOM_S = 1.0
_SOCKETS_PER_S = 250
"""While all connections are counted, and there are none, the kernel is asked for the queues of so
many: some may wait that came to a listener before it was counted."""
_TOLD_S = 1.0
"""A gap of so long is logged."""
_REPLACE_AGAIN_S = 30.0
"""So long after it was asked for, another that did not come is asked for again."""


class Health:
    """The looks, and the clock for them.

    Args:
        pool: is told what they show.
        replace: asks for another worker in place of one that hangs.
        hear: takes in what workers have notified of and was not read yet.
    """

    def __init__(
        self,
        pool: WorkerPool,
        loop: AbstractEventLoop,
        replace: Callable[[WorkerHandle], None],
        hear: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._retry = pool.retry
        self._loop = loop
        self._replace = replace
        self._hear = hear
        self._stops = 0
        self._readiness = Readiness(pool, loop)
        self._load = LoadSampler(pool, loop)
        self._histories: dict[int, History] = {}
        self._closer = Closer()
        self._watched: set[WorkerHandle] | None = None
        self._to_look_at: deque[WorkerHandle] = deque()
        self._queues: Sequence[Table | None] = ()
        self._queues_due_s = 0.0
        self._some_waited = False
        self._numbers_that_end: Collection[int] = ()
        self._due = pool.looks.add("look after workers", self._tick, _SELDOM_S)
        self.retime()

    def changed(self, worker: WorkerHandle) -> None:
        """A worker is in another state."""
        if worker.has_triggered_watchdog:
            self._watch(worker)
            self._due.within(_BREAK_S)
        self._load.changed()
        self._readiness.changed(worker)

    def retime(self) -> None:
        """The configuration may be another."""
        self._histories.clear()
        self._pool.visibility.forget()
        self._pool.clock.measure(*self._limits_s)
        self._watched = None
        if limits_s := self._limits_s:
            self._due.within(min(limits_s) / _LOOKS)
        self._load.begin()

    # Hanging.

    @property
    def _limits_s(self) -> list[float]:
        service = self._pool.generation.plan.service
        return [each for each in (service.hang_timeout, service.watchdog) if each]

    def _start_again_after_a_gap(self) -> None:
        """While we did not run nobody was heard, and workers may have stood still, too."""
        clock = self._pool.clock
        now_s = clock.now_s()
        if clock.stops == self._stops:
            return
        self._stops = clock.stops
        if clock.stopped_s >= _TOLD_S:
            self._pool.log.warning("this controller did not run for %.1f s", clock.stopped_s)
        self._histories.clear()
        for worker in self._pool.workers:
            if math.isfinite(worker.heartbeat_s):  # else it asked to be taken for hung
                worker.heartbeat_s = now_s

    def _tick(self) -> float:
        """At those who may need it, for a while; in how many seconds to go on or to begin again."""
        limits_s = self._limits_s
        if not limits_s or self._pool.shutdown.has_begun:
            return math.inf
        if not self._to_look_at:
            self._retry.attempt("keep the time of workers", self._begin_looks)
        if not self._look_at_some():
            return _BREAK_S
        excluded = partial(capacity.excluded, self._pool, self._watched or ())
        self._retry.attempt("see who is at capacity", excluded)
        if any(worker.queued and not worker.is_hung for worker in self._watched or ()):
            return min(limits_s) / _LOOKS / 4
        if self._watched or self._is_timed or self._histories:
            return min(limits_s) / _LOOKS
        return min(_SELDOM_S, min(limits_s) / _RESTING_LOOKS)

    @property
    def _is_timed(self) -> bool:
        """Whether workers have to be heard of."""
        return bool(self._pool.generation.plan.service.watchdog)

    def _begin_looks(self) -> None:
        self._start_again_after_a_gap()
        workers, now_s = self._pool.workers, self._pool.clock.now_s()
        silent = (
            {worker for worker in workers if _is_silent(worker, now_s)} if self._is_timed else ()
        )
        if silent:
            self._hear()
        if self._watched is None:
            suspects = set(workers)
        else:
            suspects = {*silent, *self._watched, *self._who_has_any()}
        there = [worker for worker in suspects if worker.process]
        self._to_look_at.extend(sorted(there, key=lambda worker: worker.slot))
        self._watched = set()
        self._numbers_that_end = {worker.spec.number for worker in there if worker.was_hung}
        pids = {worker.process.pid for worker in there if worker.process}
        self._histories = {pid: each for pid, each in self._histories.items() if pid in pids}

    def _who_has_any(self) -> Iterable[WorkerHandle]:
        """Those with a connection, or with something that waits for them."""
        busy = self._pool.backend.busy()
        workers, now_s = self._pool.workers, self._pool.clock.read_s()
        found = [worker for worker in workers if worker.slot in busy] if busy else []
        if busy is not None and now_s < self._queues_due_s:
            return found
        after_s = max(_SELDOM_S, len(workers) / _SOCKETS_PER_S)
        self._queues_due_s = on_the_beat(now_s, after_s) - TOGETHER_S
        queues = tables(self._pool)
        if None in queues:
            return workers
        if unchanged(queues, self._queues) and not self._some_waited:
            return found
        self._queues = queues
        waiting = {
            inode for table in queues for inode, each in (table or {}).items() if each.queued
        }
        self._some_waited = bool(waiting)
        if waiting:
            found += [
                worker
                for worker in workers
                if worker.process and not waiting.isdisjoint(worker.process.bound)
            ]
        return found

    def _look_at_some(self) -> bool:
        """As long as there is time; whether that was enough for all."""
        ends_s = time.monotonic() + _LOOKING_S
        while self._to_look_at:
            worker = self._to_look_at.popleft()
            look = partial(self._look_at, worker)
            if self._retry.result(f"look at worker {worker.slot}", look, True):
                self._watch(worker)
            if time.monotonic() >= ends_s:
                break
        return not self._to_look_at

    def _watch(self, worker: WorkerHandle) -> None:
        """It is looked at the next time, whatever it has."""
        if self._watched is not None:
            self._watched.add(worker)

    def _look_at(self, worker: WorkerHandle) -> bool:
        """Whether it is to be looked at again, whatever it has then."""
        if worker.process and worker.state is State.READY:
            self._look_at_ready(worker, worker.process)
            return bool(worker.queued) or worker.at_capacity or worker.excluded or worker.is_hung
        if worker.process and worker.is_hung:
            self._look_at_hung(worker, worker.process)
        elif worker.was_hung:
            self._pool.migration.migrate(worker)
        return worker.is_hung or worker.was_hung

    def _look_at_ready(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        if _is_silent(worker, self._pool.clock.now_s()):
            self._take_for_hung(worker, process, "missed its watchdog")
        elif worker.generation.plan.service.hang_timeout:
            verdict = self._judge(worker, process)
            if verdict is Verdict.HUNG:
                waits_in_vain = "takes no connections, and some wait"
                unserved = "serves none of the connections that it has taken"
                self._take_for_hung(worker, process, waits_in_vain if worker.queued else unserved)
            elif worker.at_capacity != (verdict is Verdict.FULL):
                capacity.set_at_capacity(self._pool, worker, verdict is Verdict.FULL)

    def _take_for_hung(self, worker: WorkerHandle, process: WorkerProcess, why: str) -> None:
        if not (worker.is_in_service and self._others_serve(worker)):
            return
        if self._pool.backend.name == KERNEL:
            why = f"{why}; {CHOSEN_ALL_THE_SAME}"
        self._pool.log.warning("worker %d hangs: it %s", worker.slot, why)
        worker.has_acted()
        worker.at_capacity = worker.excluded = worker.acted_since_hung = False
        self._histories.pop(process.pid, None)
        self._pool.report(worker, Event.STUCK)
        self._replace_if_due(worker)

    def _judge(self, worker: WorkerHandle, process: WorkerProcess) -> Verdict:
        now_s, open_now = self._pool.clock.now_s(), self._pool.backend.open(worker.slot)
        history = self._histories.setdefault(
            process.pid, History(worker.generation.plan.service.hang_timeout)
        )
        look_closer = partial(self._closer.look, worker, process, open_now)
        looks = self._looks(worker, process)
        worker.queued = sum(look.queued for look in looks.values())
        if worker.at_capacity:
            # An empty queue tells nothing: others may have got what waited there.
            has_room = self._has_room(worker, process)
            return Verdict.FINE if has_room else history.judge_full(now_s, look_closer)
        return history.judge(now_s, looks, open_now, look_closer)

    def _has_room(self, worker: WorkerHandle, process: WorkerProcess) -> bool:
        """One that was at capacity: it waits for connections, as far as can be seen."""
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
        is_counted = counts and worker.generation.plan.binds[at].protocol == "tcp"
        taken = counts.selected - found.queued if counts and is_counted else None
        return Look(found.queued, found.queued >= found.limit, taken, activity)

    def _others_serve(self, worker: WorkerHandle) -> bool:
        """To take the last one for hung would help nobody."""
        return any(each.serves for each in self._pool.workers if each is not worker)

    def _look_at_hung(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        if self._is_back(worker, process):
            self._pool.log.info("worker %d is back", worker.slot)
            self._pool.report(worker, Event.BACK)
        else:
            # One that is back may be at it, and would find its listener shut down.
            self._pool.migration.migrate(worker)
            self._replace_if_due(worker)

    def _is_back(self, worker: WorkerHandle, process: WorkerProcess) -> bool:
        """It did something, and waits for more."""
        if _is_silent(worker, self._pool.clock.now_s()):
            return False
        # Looked at between the two, it has acted and does not wait yet; then it rests, as others
        # have got all that waited for it.
        worker.acted_since_hung = worker.has_acted() or (worker.acted_since_hung and worker.is_hung)
        if not worker.acted_since_hung or is_stopped(process.pid):
            return False
        return waits(process) is not Seen.NO

    def _replace_if_due(self, worker: WorkerHandle) -> None:
        """One at a time on each seat: where all that is asked takes long, there would soon be
        any number of workers at it."""
        if worker.generation.plan.service.hang != "replace":
            return
        now_s = self._pool.clock.now_s()
        if (
            now_s >= worker.replace_not_before_s
            and worker.spec.number not in self._numbers_that_end
        ):
            worker.replace_not_before_s = now_s + _REPLACE_AGAIN_S
            self._replace(worker)


def _is_silent(worker: WorkerHandle, now_s: float) -> bool:
    """It missed its watchdog, or asked for what follows from that (WATCHDOG=trigger)."""
    limit_s = worker.generation.plan.service.watchdog or math.inf
    return now_s - worker.heartbeat_s >= limit_s
