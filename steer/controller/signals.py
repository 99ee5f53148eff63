"""Handles signals. A handler only begins a change: the loop does the work."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping

from steer.controller.changes import Changes
from steer.controller.reexec import Reexec
from steer.controller.rollout import unreported
from steer.controller.tasks import Tasks
from steer.linux import signals, stdio


class Signals:
    """The signal handlers of one controller.

    Args:
        stop: stops the service; its argument says whether quickly.
        reopen_files: opens log files again.
    """

    def __init__(
        self,
        changes: Changes,
        reexec: Reexec,
        tasks: Tasks,
        stop: Callable[[bool], None],
        reopen_files: Callable[[], None],
    ) -> None:
        self._changes = changes
        self._reexec = reexec
        self._tasks = tasks
        self._stop = stop
        self._reopen_files = reopen_files
        self._has_terminal = not stdio.terminal_is_gone()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Handle signals from here on. Signals that were held until now come first."""
        handlers: Mapping[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: lambda: self._stop(False),
            signal.SIGINT: lambda: self._stop(True),
            signal.SIGQUIT: lambda: self._stop(True),
            signal.SIGUSR1: self._reopen_files,
            signal.SIGUSR2: lambda: self._tasks.begin("re-execute", self._reexec.prepare),
            signal.SIGTTIN: lambda: self._scale_by("add a worker", 1, signal.SIGTTIN),
            signal.SIGTTOU: lambda: self._scale_by("end a worker", -1, signal.SIGTTOU),
            signal.SIGWINCH: self._on_window_change,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        signals.release_signals()

    def _scale_by(self, act: str, more: int, signal_number: signal.Signals) -> None:
        self._tasks.begin(act, lambda: self._changes.scale_by(more, unreported), signal_number)

    def _on_hangup(self) -> None:
        """Reload, or stop if the terminal of this process was closed."""
        if self._has_terminal and stdio.terminal_is_gone():
            self._stop(False)
        else:
            self._tasks.begin("reload", lambda: self._changes.reload(unreported), signal.SIGHUP)

    def _on_window_change(self) -> None:
        """End all workers. With a terminal, the signal only means that the window has a new
        size."""
        if not self._has_terminal:
            act = "end all workers"
            self._tasks.begin(act, lambda: self._changes.scale(0, unreported), signal.SIGWINCH)
