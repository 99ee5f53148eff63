"""Blocks the controller's signals while it starts."""

from __future__ import annotations

import signal

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_ORDERING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH)
_HANDLED = (*_ENDING, *_ORDERING)
OURS = (*_HANDLED, signal.SIGCHLD)
"""All signals that may have a handler."""
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def hold_signals() -> None:
    """Block handled signals until `release_signals`, and SIGCHLD for good, see `ChildEnds`. Forked
    children do not inherit that.

    The signal mask and ignored signals of the parent process, which execve(2) keeps, are reset:
    sudo(8) and some job runners set them. If SIGHUP is ignored it stays so, for nohup(1).
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, OURS)
    for number in signal.valid_signals() - {signal.SIGHUP, *IGNORED_BY_PYTHON}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pause(seconds: float) -> None:
    """Wait while signals are blocked, before any worker has been started.

    Raises:
        SystemExit: a signal arrived that ends the controller.
    """
    if signal.sigtimedwait(_ENDING, seconds) is not None:
        raise SystemExit(0)


def release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
