"""Slow calls beside the loop, for which nobody waits once the service has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def in_background(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns or raises, called in a thread of its own.

    Not asyncio.to_thread(): the end of the loop waits for its threads, and one that compiles
    or reads from a file system that does not answer may take for ever.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if outcome.done():  # cancelled
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(value)  # type: ignore[arg-type]

    def call() -> None:
        value, failed = None, None
        try:
            value = function(*arguments)
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            failed = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, failed)

    threading.Thread(target=call, daemon=True).start()
    return await outcome
