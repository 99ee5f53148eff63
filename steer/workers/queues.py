"""What waits in the accept queues of workers, read in whichever way is permitted."""

from __future__ import annotations

import errno
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from operator import is_

from steer.config.address import Bind
from steer.errors import KernelError
from steer.sockets import listeners, sock_diag
from steer.sockets.listeners import Waiting
from steer.sockets.sock_diag import Bound
from steer.workers.process import WorkerProcess

_FRESH_S, _FRESH_MOST_S = 0.005, 0.05
"""Answers are reused for this time, as a hundred workers may be looked at together."""
_MOST = 0.05
"""The share of time for reading queues. An answer that took long is reused for longer."""
_LASTING = (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT, errno.ENOENT)
"""Permanent refusals. Others, such as EMFILE, are temporary."""

Table = Mapping[int, Bound]
_Ask = Callable[[str, int, int], Table]


class Queues:
    """Asks the kernel once for each port, for all workers. If that is refused, borrows the sockets
    of each worker.

    Args:
        ask: see `sockdiag.Ports.at`.
        now_s: returns a time.
    """

    def __init__(
        self, ask: _Ask | None = None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask or sock_diag.Ports().at
        self._now_s = now_s
        self._tables: dict[tuple[str, int, int], tuple[float, float, Table]] = {}
        self._may_ask = True

    def of(
        self, process: WorkerProcess, after_s: float = -math.inf
    ) -> Mapping[int, Waiting] | None:
        """What waits at each bind at which a worker listens; None if it cannot be seen.

        Args:
            after_s: answers from before this time are not reused.
        """
        if self._may_ask:
            try:
                return self._by_port(process, after_s)
            except KernelError as error:
                self._may_ask = error.errno not in _LASTING
        try:
            with process.sockets() as owned:
                return {at: listeners.waiting(sock) for at, sock in owned.items()}
        except KernelError:
            return None

    def at(self, bind: Bind, after_s: float = -math.inf) -> Table | None:
        """The sockets of a bind by inode; None if the kernel refuses. It is the same object as
        before if nothing has changed.

        Args:
            after_s: answers from before this time are not reused.
        """
        try:
            return self._at(bind, after_s) if self._may_ask else None
        except KernelError:
            return None

    def forget(self) -> None:
        """Queues were changed: reuse no answers from before."""
        self._tables.clear()

    def at_one_moment(self) -> Queues:
        """A copy that asks once for each port, however long its use takes."""
        taken = Queues(self._ask, lambda: 0.0)
        taken._may_ask = self._may_ask
        return taken

    def _by_port(self, process: WorkerProcess, after_s: float) -> Mapping[int, Waiting]:
        found = {}
        for at, bind in enumerate(process.launch.binds[: len(process.bound)]):
            waiting = self._at(bind, after_s).get(process.bound[at])
            if waiting is not None:
                found[at] = waiting
        return found

    def _at(self, bind: Bind, after_s: float) -> Table:
        family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
        key, now_s = (bind.protocol, family, bind.port), self._now_s()
        asked_s, fresh_until_s, found = self._tables.get(key, (-math.inf, -math.inf, {}))
        if asked_s < after_s or now_s >= fresh_until_s:
            found = self._ask(*key)
            fresh_s = max(_FRESH_S, min(_FRESH_MOST_S, (self._now_s() - now_s) / _MOST))
            self._tables[key] = (now_s, now_s + fresh_s, found)
        return found


def unchanged(now: Sequence[Table | None], before: Sequence[Table | None]) -> bool:
    """Whether `Queues.at` gave the same answer for each bind."""
    return len(now) == len(before) and all(map(is_, now, before))
