"""Makes the changes of a service run one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from steer.errors import ControlError, Postponed, SteerError


class Turns:
    """The queue of changes of one service.

    Attributes:
        act: what the current change does, in words; for errors.
    """

    def __init__(self) -> None:
        self.act = ""
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._changing: asyncio.Task[Any] | None = None
        self._ending = False
        self._postponing = False

    @property
    def others_wait(self) -> bool:
        """Whether other changes wait for their turn."""
        return self._waiting > 0

    def postpone(self) -> None:
        """Refuse more changes, and have clients ask the next controller."""
        self._postponing = True

    def end(self) -> None:
        """Refuse more changes, as the service ends, and cancel the current one."""
        if not self._ending and self._changing is not None:
            self._changing.cancel()
        self._ending = True

    @asynccontextmanager
    async def turn(self, act: str) -> AsyncIterator[None]:
        """Wait for our turn. The block is one change.

        Raises:
            ControlError: the service is ending.
            Postponed: this controller is being replaced.
        """
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        self._changing = task = asyncio.current_task()
        assert task is not None
        try:
            if self._postponing:
                raise Postponed(act, "the controller is being replaced", "ask again")
            self._refuse_at_the_end(act)
            self.act = act
            yield
        except asyncio.CancelledError:
            if self._ending and not task.uncancel():
                self._refuse_at_the_end(act)
            raise
        except SteerError:
            self._refuse_at_the_end(act)
            raise
        finally:
            self._changing = None
            self._turn.release()

    def _refuse_at_the_end(self, act: str) -> None:
        if self._ending:
            raise ControlError(act, "the service is ending")
