"""What waits at each worker, by whichever way we may see it."""

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
"""Whoever asks within this gets the same answer: a hundred workers may be asked after at once."""
_MOST = 0.05
"""Of the time may be spent on answers: one that took long is fresh for longer."""
_LASTING = (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT, errno.ENOENT)
"""Refusals that do not pass, as EMFILE and its like do."""

Table = Mapping[int, Bound]
_Ask = Callable[[str, int, int], Table]


class Queues:
    """Asks the kernel by the port, for all workers at once; where that is refused, borrows the
    sockets of each.

    Args:
        ask: see `sockdiag.Ports.at`.
        now_s: a time.
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
        """By bind, of those sockets of a worker that listen; None where it cannot be seen.

        Args:
            after_s: not as it was before that time.
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
        """The sockets there, by inode; None where the kernel does not tell. The same object as
        before if nothing has changed.

        Args:
            after_s: not as they were before that time.
        """
        try:
            return self._at(bind, after_s) if self._may_ask else None
        except KernelError:
            return None

    def forget(self) -> None:
        """Something was done to queues, so that who asks from here on is to see it."""
        self._tables.clear()

    def at_one_moment(self) -> Queues:
        """The same, but each port is asked once, however long it takes to go through workers."""
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
    """Whether `Queues.at` said the same of each address."""
    return len(now) == len(before) and all(map(is_, now, before))
