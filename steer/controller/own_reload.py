"""Has servers reload themselves, by their own signal, in place of starting others."""

from __future__ import annotations

import asyncio
import time
from signal import Signals

from steer.config.plan import Plan
from steer.errors import KernelError, WorkersFailed
from steer.linux import processes, waiting
from steer.linux.procfs import Files
from steer.workers import own_listeners
from steer.workers.handle import WorkerHandle
from steer.workers.process import WorkerProcess

_AT_START = ("command", "instances", "user", "group", "keep_privileges", "env", "chdir")
"""Keys that only a start puts in force."""
_LOOK_AGAIN_S = 0.05


def signal_for(now: Plan, wanted: Plan) -> Signals | None:
    """The signal on which the servers of a plan put another plan in force. Pure.

    Returns:
        None: other servers have to be started.
    """
    before, after = now.service, wanted.service
    if not after.adopts or any(getattr(before, key) != getattr(after, key) for key in _AT_START):
        return None
    return after.own_reload_signal


async def reload(worker: WorkerHandle, number: Signals) -> None:
    """Have a server reload itself, and wait until a process that it has started since serves.

    Raises:
        WorkersFailed: none does within --ready-timeout, or the server has ended.
    """
    process = worker.process
    if process is None:
        return  # it is about to be started, and reads its configuration then
    limit_s = worker.service.ready_timeout
    end_s = time.monotonic() + limit_s
    before = frozenset(processes.family(process.pid, Files()))
    process.signal(number)
    while worker.process is process and time.monotonic() < end_s:
        if _serving(process) - before:
            return
        await asyncio.sleep(_LOOK_AGAIN_S)
    act = f"have server {worker.slot} reload itself by {number.name}"
    if worker.process is not process:
        raise WorkersFailed(act, "it has ended", "it is started again; see its log")
    cause = f"no new process of it serves within {limit_s:g} s"
    cure = "see its log, or set reload_signal to none to have another server started"
    raise WorkersFailed(act, cause, cure, detail=process.last_words)


def _serving(process: WorkerProcess) -> frozenset[int]:
    """The processes that wait on its listeners."""
    try:
        return waiting.waiters(process.pid, own_listeners.find(process))
    except KernelError:
        return frozenset()
