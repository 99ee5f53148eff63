"""Turns errors into refusals, and logs changes and requests that failed."""

from __future__ import annotations

import traceback

from steer.errors import SteerError
from steer.linux.log import Log
from steer.linux.retry import as_refusal, is_lack


def refusal_of(log: Log, act: str, error: Exception) -> SteerError:
    """Turn any error into a refusal. If the error is a bug, its traceback is logged at debug
    level."""
    if not is_lack(error):
        log.debug("%s", "".join(traceback.format_exception(error)))
    return as_refusal(act, error)


def log_failure(log: Log, act: str, error: SteerError) -> None:
    log.error("cannot %s: %s", act, error)
    for line in error.detail.splitlines():
        log.error("  | %s", line)


def log_refused_request(log: Log, command: str, error: SteerError) -> None:
    """Log a refused request in one line, as a warning. The client gets the details."""
    log.warning("request %s refused: %s", command, error)
    for line in error.detail.splitlines():
        log.debug("  | %s", line)
