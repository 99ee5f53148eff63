"""Finds workers that listen on other sockets than those that steer gave them, or elsewhere than at
the address whose listeners are to be adopted."""

from __future__ import annotations

from steer.child.launch import FIRST_FD
from steer.config import servers
from steer.errors import WorkersFailed
from steer.linux import processes
from steer.linux.log import Log
from steer.linux.waiting import Seen
from steer.sockets import elsewhere
from steer.values import several
from steer.workers import own_listeners
from steer.workers.handle import WorkerHandle, waits
from steer.workers.process import WorkerProcess

_FIRST_LOOK_S = 1.0
"""Time from a worker's start to the first look. The time to each further look doubles, as a look
may read a large table."""


def diagnosis(process: WorkerProcess) -> tuple[str, str] | None:
    """Where a worker listens instead, and what to add to its command. None if it listens nowhere
    else, if it also waits on the sockets it was given, or if steer cannot see that."""
    if process.launch.service.adopts:
        return own_listeners.diagnosis(process)
    if all(bind.protocol != "tcp" for bind in process.launch.binds):
        return None
    if waits(process) is not Seen.NO:
        return None
    found = elsewhere.find(process.pid, process.inodes)
    if found is None:
        return None
    ports = several("port", found.ports)
    who = f"{processes.command(found.pid) or 'it'} (pid {found.pid})"
    command = process.launch.service.command
    cure = servers.listen_cure(
        command, processes.arguments(process.pid), processes.arguments(found.pid)
    )
    if command:
        return f"{who} listens on {ports}, and nobody waits on descriptor {FIRST_FD}", cure
    return f"it listens on {ports}, and does not wait on worker.sockets", cure


def not_ready(process: WorkerProcess) -> WorkersFailed:
    """The error for a worker that is killed at its --ready-timeout."""
    limit = f"not ready within {process.launch.service.ready_timeout:g} s"
    if found := diagnosis(process):
        cause, cure = f"{limit}: {found[0]}", found[1]
    elif process.launch.service.adopts:
        why, cure = own_listeners.not_ready(process)
        cause = f"{limit}: {why}"
    else:
        cause = limit
        cure = "see ready_timeout; ready is who says READY=1 or waits on its socket"
    return WorkersFailed("start workers", cause, cure, detail=process.last_words)


class ElsewhereLog:
    """Logs that a starting worker listens elsewhere, before its --ready-timeout is over.

    Workers of a service run the same program, so it logs this for one of them only."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._after_s: dict[int, float] = {}
        self._told: set[str] = set()

    def look(self, worker: WorkerHandle, process: WorkerProcess, age_s: float) -> None:
        """Look at a starting worker, if its next look is due.

        Args:
            age_s: how long the process has run.
        """
        if age_s < self._after_s.setdefault(process.pid, _FIRST_LOOK_S):
            return
        self._after_s[process.pid] *= 2
        if found := diagnosis(process):
            self._after_s[process.pid] = float("inf")
            cause, cure = found
            if cure not in self._told:
                self._told.add(cure)
                self._log.warning("worker %d: %s; %s", worker.slot, cause, cure)

    def forget(self) -> None:
        """No worker is starting any more."""
        self._after_s.clear()
        self._told.clear()
