"""Re-executes the controller: it becomes what is installed now, while its workers serve on."""

from __future__ import annotations

import asyncio
import sys

from steer.controller.controller import Controller
from steer.controller.state import ServiceState
from steer.controller.turns import Turns
from steer.errors import ConfigError, ControlError
from steer.linux import fork, signals
from steer.linux.log import Log


class Reexec:
    """Of one controller.

    Attributes:
        is_due: set when the loop has to end, so that the controller is re-executed. From then
            on signals are held.
    """

    def __init__(self, service: Controller, turns: Turns, state: ServiceState, log: Log) -> None:
        self.is_due = asyncio.Event()
        self._service = service
        self._turns = turns
        self._state = state
        self._log = log

    async def prepare(self) -> None:
        """Have the loop end if the controller would start again with the same arguments.

        Raises:
            ConfigError: what is installed now, or the configuration, would not start.
            ControlError: there is nobody to hold the workers meanwhile, or no worker.
        """
        act = "re-execute"
        await _see_that_it_would_start(act)
        while not self.is_due.is_set():
            async with self._turns.turn(act):
                # Who asked before us comes first.
                if not self._turns.others_wait:
                    self._leave(act)

    def _leave(self, act: str) -> None:
        """Raises ControlError: not now."""
        if not self._service.plan.service.adopt_timeout:
            raise ControlError(act, "workers would end with us", "see --adopt-timeout")
        has_workers = any(each.process for each in self._service.pool.workers)
        if not self._state.is_running or not has_workers:
            raise ControlError(act, "no worker would be there meanwhile")
        if not self._service.guard.expect_back():
            raise ControlError(act, "the guard process is gone", "there is another soon")
        self._log.info("re-executing")
        signals.hold_signals()
        self._turns.postpone()
        self.is_due.set()


async def _see_that_it_would_start(act: str) -> None:
    """Raises ConfigError."""
    at = sys.orig_argv.index("run") + 1
    check = [sys.executable, *sys.orig_argv[1:at], "--check-config", *sys.orig_argv[at:]]
    with fork.starting() as began_as:
        tried = await asyncio.create_subprocess_exec(
            *check, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        began_as(tried.pid)
    try:
        _, words = await tried.communicate()
    except asyncio.CancelledError:
        tried.kill()
        raise
    fork.is_done(tried.pid)
    if tried.returncode != 0:
        raise ConfigError(act, "it would not start", detail=words.decode(errors="replace"))
