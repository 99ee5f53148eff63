"""What signals do to `steer attach`: those that tell `steer run` to do something with its workers
are ignored, and the log says so."""

from __future__ import annotations

import signal
from asyncio import AbstractEventLoop
from collections.abc import Callable
from functools import partial

from steer.linux import signals, stdio
from steer.linux.log import Log

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
_WORKERS = "the workers are not steer's: use the server's own commands"
_IGNORED = {
    signal.SIGTTIN: _WORKERS,
    signal.SIGTTOU: _WORKERS,
    signal.SIGWINCH: _WORKERS,
}


class Signals:
    """The handlers.

    Args:
        end: detaches, and ends this process.
        reopened: called after log files were opened again.
        reexecute: re-executes this process.
    """

    def __init__(
        self,
        end: Callable[[], object],
        reopened: Callable[[], object],
        reexecute: Callable[[], object],
        log: Log,
    ) -> None:
        self._end = end
        self._reexecute = reexecute
        self._reopened = reopened
        self._log = log
        self._files = {number: stdio.file_of(number) for number in (1, 2)}
        self._has_terminal = not stdio.terminal_is_gone()

    def watch(self, loop: AbstractEventLoop) -> None:
        """Handle signals from here on. Signals that were held until now come first."""
        for number in _ENDING:
            loop.add_signal_handler(number, self._end)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
            loop.add_signal_handler(signal.SIGHUP, self._end)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_files)
        loop.add_signal_handler(signal.SIGUSR2, self._reexecute)
        for number in _IGNORED:
            loop.add_signal_handler(number, partial(self._ignore, number))
        signals.release_signals()

    def _ignore(self, number: signal.Signals) -> None:
        # With a terminal, SIGWINCH only means that the window has a new size.
        if not (number is signal.SIGWINCH and self._has_terminal):
            self._log.info("%s is ignored: %s", number.name, _IGNORED[number])

    def _reopen_files(self) -> None:
        """Open log files again: logrotate(8) has moved them."""
        for number, path in self._files.items():
            if path:
                try:
                    stdio.reopen(number, path)
                except OSError as error:
                    self._log.error("open %s again: %s", path, error.strerror)
        if not any(self._files.values()):
            self._log.info("SIGUSR1: output goes to no file, so no file is opened again")
        self._reopened()
