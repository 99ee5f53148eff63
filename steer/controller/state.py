"""The state of a service: starting, running or stopping. The supervisor, if any, is notified."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from steer.control.notify import notify_supervisor

_STARTING, _RUNNING, _STOPPING = "starting", "running", "stopping"


class ServiceState:
    """The state of one service.

    Args:
        environment: has the notification socket of the supervisor, see sd_notify(3).

    Attributes:
        name: the state, as `steer status` shows it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.name = _STARTING

    @property
    def is_running(self) -> bool:
        return self.name == _RUNNING

    @property
    def is_stopping(self) -> bool:
        return self.name == _STOPPING

    def set_running(self) -> None:
        self.name = _RUNNING
        self._notify(f"READY=1\nMAINPID={os.getpid()}")

    def set_stopping(self) -> None:
        self.name = _STOPPING
        self._notify("STOPPING=1")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """In the block, the configuration is being read again."""
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            if self.is_running:
                self._notify("READY=1")

    def _notify(self, message: str) -> None:
        notify_supervisor(message, self._environment)
