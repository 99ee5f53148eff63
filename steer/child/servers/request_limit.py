"""Has a worker replaced after a number of requests, as an option of the server says.

The server itself would end, and its worker would be missing until another has started. So steer
counts in its place: another worker is ready first, and this one serves until then.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

from steer.child.api import Worker
from steer.config.applications import Interface

_ASK_AGAIN_S = 30.0


class RequestLimit:
    """The limit of one worker.

    Args:
        most: the number of requests; None: no limit.
        jitter: the most that is added to it, at random, so that workers do not all end at once.
    """

    def __init__(self, most: int | None, jitter: int, worker: Worker) -> None:
        self._most = math.inf if most is None else most + random.randint(0, jitter)
        self._worker = worker
        self._asked_s = -math.inf
        self._served = 0

    def served(self, total: int) -> None:
        """Ask for a replacement if the worker has served as many requests in all."""
        if total < self._most:
            return
        now_s = time.monotonic()
        if now_s - self._asked_s >= _ASK_AGAIN_S:
            self._asked_s = now_s
            self._worker.replace()

    def counted(self, app: Callable[..., Any], interface: Interface) -> Callable[..., Any]:
        """The application, with its requests counted."""
        if self._most == math.inf:
            return app
        if interface is Interface.WSGI:
            return lambda environ, start_response: self._count(app)(environ, start_response)

        async def asgi(scope: Any, receive: Any, send: Any) -> None:
            await (app if scope["type"] == "lifespan" else self._count(app))(scope, receive, send)

        return asgi

    def _count(self, app: Callable[..., Any]) -> Callable[..., Any]:
        self._served += 1
        self.served(self._served)
        return app
