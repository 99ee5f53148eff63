"""Replaces workers that use too much memory, have served for long enough, or ask for it.

Another worker is ready before one leaves, and never are two replaced at once.
"""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from steer.config.service import Service
from steer.linux import memory, processes
from steer.linux.procfs import Files
from steer.workers.handle import WorkerHandle
from steer.workers.pool import WorkerPool
from steer.workers.process import WorkerProcess

LOOK_S = 1.0
_STEP_S, _BREAK_S = 0.005, 0.05
"""How long to look at a time, and how long to pause before the rest."""
_RETRY_S = 30.0
"""How long to wait after a replacement has failed: the next would probably fail, too."""
_REST = 50
"""How long to rest after a walk through page tables, in terms of how long it took."""


class Use(NamedTuple):
    """What a worker has used so far.

    Args:
        memory_bytes: the memory of its processes; None: it was not read.
        asks: whether it asks to be replaced, because of a limit of its own.
    """

    age_s: float
    memory_bytes: int | None
    asks: bool = False


def why_due(service: Service, use: Use, share: float) -> tuple[str, str] | None:
    """Whether a worker is to be replaced. Pure.

    Args:
        share: see `Lifetime.of`.

    Returns:
        The name of the limit that it exceeds, and that in words; None: it exceeds none.
    """
    most_bytes, lifetime = service.max_memory_bytes, service.lifetime
    if most_bytes is not None and use.memory_bytes is not None and use.memory_bytes > most_bytes:
        found = f"it uses {_mib(use.memory_bytes)}, more than {_mib(most_bytes)}"
        return "memory", found
    if lifetime is not None and use.age_s > lifetime.of(share):
        return "lifetime", f"it has run for {use.age_s:.0f} s"
    return ("asked", "it asks to be replaced") if use.asks else None


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def share_of(process: WorkerProcess) -> float:
    """A number from 0 to 1 that is always the same for a process, so that each look and each
    controller that adopts it find the same lifetime."""
    return zlib.crc32(f"{process.pid} {process.started_s}".encode()) / 0xFFFFFFFF


class Recycling:
    """Looks at the workers of one service.

    Args:
        replace: begins to replace a worker.

    Attributes:
        replaced: how many workers were replaced, by the limit that they had exceeded.
    """

    def __init__(
        self,
        pool: WorkerPool,
        replace: Callable[[WorkerHandle], asyncio.Task[None]],
    ) -> None:
        self._pool = pool
        self._replace = replace
        self.replaced: Counter[str] = Counter()
        self._to_look_at: deque[WorkerHandle] = deque()
        self._retry_s = self._rested_s = -math.inf
        self._is_unread_told = False
        self._look = pool.looks.add("look for workers to recycle", self.look, math.inf)
        self.reconfigure()

    def reconfigure(self) -> None:
        """The configuration may have changed."""
        if self._has_limits:
            self._look.within(LOOK_S)

    def asked(self) -> None:
        """A worker asks to be replaced."""
        self._look.within(0)

    @property
    def _is_needed(self) -> bool:
        return self._has_limits or any(each.asks_replacement for each in self._pool.workers)

    @property
    def _has_limits(self) -> bool:
        service = self._pool.service
        return service.max_memory is not None or service.max_lifetime is not None

    def look(self) -> float:
        """Look at some workers. Returns in how many seconds to continue."""
        if not self._is_needed or self._pool.shutdown.has_begun:
            return math.inf
        began_s = time.monotonic()
        if began_s < self._retry_s:
            return LOOK_S
        if not self._to_look_at:
            self._to_look_at.extend(self._pool.workers)
        while self._to_look_at:
            if self._begin(self._to_look_at.popleft()):
                break
            now_s = time.monotonic()
            if now_s < self._rested_s:
                return self._rested_s - now_s
            if now_s - began_s > _STEP_S:
                return _BREAK_S
        return LOOK_S

    def _begin(self, worker: WorkerHandle) -> bool:
        """Replace a worker if it is due. Returns whether it is."""
        if not worker.is_in_service or worker.process is None:
            return False
        service = self._pool.service
        age_s = time.monotonic() - worker.process.started_s
        use = Use(age_s, self._memory_bytes(worker.process), worker.asks_replacement)
        due = why_due(service, use, share_of(worker.process))
        if due is None:
            return False
        limit, found = due
        self._retry_s = math.inf  # one at a time: until it is done
        self._pool.log.info("worker %d: %s; replacing it", worker.slot, found)
        task = self._replace(worker)
        task.add_done_callback(lambda _: self._done(worker, limit))
        return True

    def _done(self, worker: WorkerHandle, limit: str) -> None:
        has_failed = worker.is_in_service
        self._retry_s = time.monotonic() + _RETRY_S if has_failed else -math.inf
        if not has_failed:
            self.replaced[limit] += 1

    def _memory_bytes(self, process: WorkerProcess) -> int | None:
        """The memory of a worker as far as it matters: if its resident memory is below the limit,
        that is enough to know."""
        most_bytes = self._pool.service.max_memory_bytes
        if most_bytes is None:
            return None
        files = Files()
        pids = processes.family(process.pid, files)
        resident_bytes = memory.rss_bytes(pids, files)
        if resident_bytes <= most_bytes:
            return resident_bytes
        began_s = time.monotonic()
        found = memory.pss_bytes(pids, files)
        ended_s = time.monotonic()
        self._rested_s = ended_s + _REST * (ended_s - began_s)
        if found is None:
            self._tell_unread()
            return resident_bytes
        return found

    def _tell_unread(self) -> None:
        if not self._is_unread_told:
            self._is_unread_told = True
            self._pool.log.warning(
                "max_memory: pages that workers share count in full for each, as their"
                " /proc/PID/smaps_rollup may not be read"
            )
