"""Signals of the controller: held while it starts, and let through afterwards."""

from __future__ import annotations

import signal

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_ORDERING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH)
_HANDLED = (*_ENDING, *_ORDERING)
OURS = (*_HANDLED, signal.SIGCHLD)
"""All that there may be a handler for."""


IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def hold_signals() -> None:
    """Let signals that are handled wait until `release_signals`, and SIGCHLD for good, see
    `ChildEnds`; no child that is forked inherits that.

    Whatever else the parent left us with is undone: a mask, and signals that are ignored
    (execve(2) keeps both), as under sudo(8) and some job runners. SIGHUP stays ignored: nohup(1).
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, OURS)
    for number in signal.valid_signals() - {signal.SIGHUP, *IGNORED_BY_PYTHON}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pause(seconds: float) -> None:
    """While signals are held; one that ends us ends us at once, as nothing has begun.

    Raises:
        SystemExit: there was one.
    """
    if signal.sigtimedwait(_ENDING, seconds) is not None:
        raise SystemExit(0)


def release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
