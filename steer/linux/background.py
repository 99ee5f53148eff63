"""Runs slow calls in threads that do not keep the controller from ending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from steer.linux import threads

T = TypeVar("T")


async def in_background(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new thread; return its result or raise its error. Raises NoThread.

    This is not asyncio.to_thread(), because a loop waits for its threads before it ends. A thread
    that compiles, or reads from a file system that does not answer, may never end.
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
        except Exception as error:  # noqa: BLE001 - the waiting task raises it
            failed = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, failed)

    threads.start(call)
    return await outcome
