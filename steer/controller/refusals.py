"""Turns errors into refusals, and logs changes and requests that failed."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from steer.control.commands import Command
from steer.control.outcomes import Outcome
from steer.control.protocol import Request
from steer.control.server import Handler, Progress
from steer.errors import Postponed, SteerError
from steer.linux.log import Log
from steer.linux.retry import as_refusal, is_lack

Answer = Outcome | Mapping[str, Any]
Handle = Callable[[Request, Progress], Awaitable[Answer]]


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


def logged(command: Command, handle: Handle, service: str, log: Log) -> Handler:
    """A handler that gets only the arguments of the command, and logs each refusal.

    Args:
        service: the name of the service, for the log.
    """

    async def handler(request: Request, progress: Progress) -> Mapping[str, Any]:
        carried = {key: request[key] for key in command.carries if key in request}
        try:
            answer = await handle(carried, progress)
        except Postponed:
            raise
        except Exception as error:  # noqa: BLE001 - the client gets it as an answer
            refusal = refusal_of(log, f"{command.name} {service}", error)
            log_refused_request(log, command.name, refusal)
            raise refusal from None
        return msgspec.structs.asdict(answer) if isinstance(answer, Outcome) else answer

    return handler
