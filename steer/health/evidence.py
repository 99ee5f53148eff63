"""A closer look at a worker: its CPU time, its connections, and what it waits for.

The look is expensive, so only suspects get one; see `hang.History`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence

from steer.config.address import Bind
from steer.errors import KernelError
from steer.linux import activity, processes
from steer.linux.procfs import Files
from steer.linux.waiting import Seen, in_event_loop
from steer.sockets import sock_diag
from steer.sockets.sock_diag import Connection
from steer.workers.handle import WorkerHandle, waits
from steer.workers.hang import Evidence
from steer.workers.process import WorkerProcess

_MOST = 4096
"""The most connections of a port to read in one look, in some 20 ms. They stand for all."""
_FRESH_S = 0.05
"""Several workers that are suspect at once share one look at their ports."""


class CloserLook:
    """Takes closer looks.

    Args:
        now_s: returns a time.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._ports: dict[tuple[int, int], tuple[float, Sequence[Connection]]] = {}

    def look(self, worker: WorkerHandle, process: WorkerProcess, open_now: int | None) -> Evidence:
        """The evidence that can be seen.

        Args:
            open_now: the number of its connections, if they are counted.
        """
        held = self._connections(worker, process)
        return Evidence(activity.cpu_s(process.pid), open_now, held, _awaits(worker, process))

    def _connections(
        self, worker: WorkerHandle, process: WorkerProcess
    ) -> dict[int, tuple[int, int]] | None:
        try:
            own = processes.open_sockets(process.pid) - worker.initial_sockets - process.inodes
            connections = [each for bind in process.launch.binds for each in self._at(bind)]
        except KernelError:
            return None
        return {each.inode: (each.unread, each.moved) for each in connections if each.inode in own}

    def _at(self, bind: Bind) -> Sequence[Connection]:
        if bind.protocol != "tcp":
            return ()
        key = (socket.AF_INET6 if bind.is_v6 else socket.AF_INET, bind.port)
        now_s = self._now_s()
        asked_s, found = self._ports.get(key, (-_FRESH_S, ()))
        if now_s - asked_s >= _FRESH_S:
            found = sock_diag.connections(*key, _MOST)
            self._ports[key] = (now_s, found)
        return found


def _awaits(worker: WorkerHandle, process: WorkerProcess) -> bool | None:
    """Whether a thread that accepts connections sleeps in its event loop, or in accept(2). If no
    such thread exists any more, the first thread of each process is looked at."""
    if activity.is_stopped(process.pid):
        return False
    for_more = waits(process)
    if for_more is Seen.YES:
        return True
    family = processes.family(process.pid, Files())
    accepting = [tid for tid in worker.accepting_tids if os.path.exists(f"/proc/{tid}")]
    seen = max(for_more, in_event_loop(accepting or family))
    return {Seen.YES: True, Seen.NO: False, Seen.UNKNOWN: None}[seen]
