"""Sees where a new worker's UDP socket has parted from the group, and has all workers replaced.

At an address without an anchor (see `anchor`) the kernel puts a newcomer together with a connected
socket that a worker has there, and it then gets all new clients, or none. Sockets that are made
together are together: so the cure is a new generation.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial

from steer.backends.anchors import cure, is_at_risk
from steer.config.address import Bind
from steer.sockets import members
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool

_AGAIN_S = 5.0
"""The time between replacements of all workers, in case workers crash again and again."""


class Splits:
    """Looks at each worker that starts.

    Args:
        renew: requests a new generation of all workers, unless there is one after this number.
    """

    def __init__(
        self,
        pool: WorkerPool,
        loop: asyncio.AbstractEventLoop,
        renew: Callable[[int], asyncio.Task[None]],
    ) -> None:
        self._pool = pool
        self._loop = loop
        self._renew = renew
        self._split = 0
        self._not_before_s = -math.inf
        self._is_due = False

    def changed(self, worker: WorkerHandle) -> None:
        """A worker's state has changed."""
        if worker.state is not State.STARTING or not worker.process:
            return
        at_risk = self._at_risk(worker.process.launch.binds)
        # In this order: the others are looked through for the few binds that may split.
        if at_risk and self._others_stay(worker):
            act = f"see whether worker {worker.slot} is in its groups"
            worker.is_apart = False
            for bind in at_risk:
                self._pool.retry.attempt(act, partial(self._look, worker, bind))

    def _others_stay(self, worker: WorkerHandle) -> bool:
        """Whether older workers of its generation stay. Sockets of new workers are together."""
        is_in_force = worker.generation.number == self._pool.generation.number
        others = (each for each in self._pool.workers if each is not worker)
        return is_in_force and any(each.process and each.serves for each in others)

    def _look(self, worker: WorkerHandle, bind: Bind) -> None:
        if members.has_connected(bind):
            worker.is_apart = True
            self._pool.entries.write(worker)
            self._found(worker, bind)

    def go_on(self) -> None:
        """Continue with the splits that the previous controller found."""
        for worker in self._pool.workers:
            if worker.is_apart and worker.generation.number == self._pool.generation.number:
                for bind in self._at_risk(worker.binds):
                    self._found(worker, bind)

    def _found(self, worker: WorkerHandle, bind: Bind) -> None:
        self._warn(worker, bind)
        self._split = worker.generation.number
        self._heal_soon()

    def _at_risk(self, binds: Sequence[Bind]) -> Sequence[Bind]:
        anchors = self._pool.backend.anchors
        return [bind for at, bind in enumerate(binds) if is_at_risk(at, bind, anchors)]

    def _warn(self, worker: WorkerHandle, bind: Bind) -> None:
        words = (
            f"{bind.label}: workers have connected sockets there, so that worker {worker.slot}, "
            "which started later, gets all new clients, or none; all workers are replaced; "
            f"{cure(bind)}"
        )
        self._pool.log.warning("%s", words)
        self._pool.group_notes[f"{bind.label} split"] = words

    def _heal_soon(self) -> None:
        """Replace all workers now, or some time after the last replacement."""
        if not self._is_due:
            self._is_due = True
            wait_s = self._not_before_s - self._pool.clock.now_s()
            self._loop.call_later(max(0.0, wait_s), self._heal)

    def _heal(self) -> None:
        if not self._is_split():
            self._is_due = False
            return
        self._renew(self._split).add_done_callback(self._healed)

    def _healed(self, _renewing: asyncio.Task[None]) -> None:
        """Or not, as the new workers did not come up; why is logged."""
        self._is_due = False
        self._not_before_s = self._pool.clock.now_s() + _AGAIN_S
        if self._is_split():
            self._heal_soon()

    def _is_split(self) -> bool:
        return self._pool.generation.number == self._split
