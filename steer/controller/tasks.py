"""Changes that no client waits for. Signals and health checks begin them; errors are logged."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from steer.controller.refusals import log_failure, refusal_of
from steer.controller.state import ServiceState
from steer.errors import ControlError, Postponed
from steer.linux.log import Log

Change = Callable[[], Coroutine[Any, Any, object]]


class Tasks:
    """The changes of one service that no client waits for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, state: ServiceState, log: Log) -> None:
        self._loop = loop
        self._state = state
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_empty(self) -> bool:
        return not self._tasks

    def begin(
        self, act: str, change: Change, signal_number: signal.Signals | None = None
    ) -> asyncio.Task[None]:
        """Carry out a change.

        Args:
            act: what it does, in words, for the log.
            signal_number: the signal to send ourselves again if the change has to wait for the next
                controller.
        """
        task = self._loop.create_task(self._logged(act, change, signal_number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def wait(self) -> None:
        """Wait until all changes are done."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _logged(self, act: str, change: Change, signal_number: signal.Signals | None) -> None:
        try:
            await change()
        except Postponed:
            # Signals are held by now, so the signal waits for the next controller.
            if signal_number is not None:
                os.kill(os.getpid(), signal_number)
        except Exception as error:  # noqa: BLE001 - logged, as no client waits
            # Once the service is stopping, refused changes are expected.
            if not self._state.is_stopping or not isinstance(error, ControlError):
                log_failure(self._log, act, refusal_of(self._log, act, error))
