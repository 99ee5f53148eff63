"""Keeps up the guard process, the control socket and the record of workers of a service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from steer.control.claim import Claim
from steer.control.server import Server
from steer.controller.state import ServiceState
from steer.guard.client import GuardClient
from steer.linux.log import Log
from steer.linux.retry import Retry

_LOOK_S = 2.0
"""How often to check that the control socket still has its path."""
_REVIVE_S = 0.5
"""How long to wait before another guard is started: it may be killed for the same reason."""


class GuardWatch:
    """Starts another guard process if the guard process was killed."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, guard: GuardClient, retry: Retry, log: Log
    ) -> None:
        self._loop = loop
        self._guard = guard
        self._retry = retry
        self._log = log

    def begin(self) -> None:
        self._loop.add_reader(self._guard, self._on_end)

    def end(self) -> None:
        self._loop.remove_reader(self._guard)

    def _on_end(self) -> None:
        """Start another guard process soon. Until then no other controller could adopt the
        workers."""
        self.end()
        self._log.warning("the guard process was killed; starting another")
        act = "start another guard process"
        self._loop.call_later(_REVIVE_S, self._retry.until_done, act, self._revive)

    def _revive(self) -> None:
        """Start another guard process, unless a new control socket has come with one meanwhile."""
        if self._guard.has_ended or not self._guard.alive:
            self._guard.revive()
        self.begin()


class ControlSocketWatch:
    """Makes the control socket again if its path was removed, and rewrites the record of workers.

    Args:
        renew: makes the control socket again, and starts another guard process that has it.
    """

    def __init__(
        self,
        claim: Claim,
        renew: Callable[[], None],
        server: Server,
        guard: GuardClient,
        guard_watch: GuardWatch,
        state: ServiceState,
        retry: Retry,
    ) -> None:
        self._claim = claim
        self._renew = renew
        self._server = server
        self._guard = guard
        self._guard_watch = guard_watch
        self._state = state
        self._retry = retry

    def look(self) -> float:
        """Check both. Returns after how many seconds to check again."""
        if not self._claim.is_there and self._state.is_running:
            self._retry.attempt("make the control socket again", self._make_again)
        self._retry.attempt("write the record of workers", self._guard.renew_record)
        return _LOOK_S

    def _make_again(self) -> None:
        self._guard_watch.end()
        try:
            with self._server.elsewhere():
                self._renew()
        finally:
            self._guard_watch.begin()
