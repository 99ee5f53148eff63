"""Re-executes the controller: the installed version of steer takes over while workers serve on."""

from __future__ import annotations

import asyncio
import sys

from steer.controller.state import ServiceState
from steer.controller.turns import Turns
from steer.errors import ConfigError, ControlError
from steer.guard.client import GuardClient
from steer.linux import fork, signals
from steer.linux.log import Log
from steer.workers.pool import WorkerPool


class Reexec:
    """Prepares the re-execution of one controller.

    Attributes:
        is_due: set when the loop has to end, so that the controller is re-executed. From then
            on signals are held.
    """

    def __init__(
        self, pool: WorkerPool, guard: GuardClient, turns: Turns, state: ServiceState, log: Log
    ) -> None:
        self.is_due = asyncio.Event()
        self._pool = pool
        self._guard = guard
        self._turns = turns
        self._state = state
        self._log = log

    async def prepare(self) -> None:
        """End the loop for a re-execution, if the installed version starts with the same arguments.

        Raises:
            ConfigError: the installed version would not start with this configuration.
            ControlError: there is no guard process to keep the workers, or no worker.
        """
        act = "re-execute"
        await _check_would_start(act)
        while not self.is_due.is_set():
            async with self._turns.turn(act):
                # Changes that were requested before come first.
                if not self._turns.others_wait:
                    self._end_loop(act)

    def _end_loop(self, act: str) -> None:
        """End the loop. Raises ControlError: a re-execution is not possible now."""
        if not self._guard.adopt_timeout_s:
            cause = "workers would end with the controller"
            raise ControlError(act, cause, "see adopt_timeout")
        has_workers = any(each.process for each in self._pool.workers)
        if not self._state.is_running or not has_workers:
            raise ControlError(act, "no worker would serve meanwhile")
        if not self._guard.expect_back():
            cause = "the guard process has ended, and another is being started"
            raise ControlError(act, cause, "try again in a second")
        self._log.info("re-executing")
        signals.hold_signals()
        self._turns.postpone()
        self.is_due.set()


async def _check_would_start(act: str) -> None:
    """Run `steer run --check-config` with our arguments. Raises ConfigError: it fails."""
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
    fork.remove_started(tried.pid)
    if tried.returncode != 0:
        raise ConfigError(act, "it would not start", detail=words.decode(errors="replace"))
