"""What a controller does about listeners that the commands of its workers open themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from steer.control import schema
    from steer.control.server import Handler
    from steer.workers.handle import WorkerHandle
    from steer.workers.pool import WorkerPool


class OwnListeners(Protocol):
    """They are selected by other means than the pool's backend; see `attach.adopted`."""

    def begin(self, loop: AbstractEventLoop, pool: WorkerPool) -> None:
        """Select among them from here on. The pool is about to be watched."""

    def changed(self, worker: WorkerHandle) -> None:
        """A worker's state has changed."""

    async def reconfigured(self) -> None:
        """Another configuration is in force for the workers. Raises SteerError."""

    def handlers(self) -> Mapping[str, Handler]:
        """The requests that concern listeners, in place of those of the pool."""

    def report(self, pool: schema.Service) -> schema.Service:
        """The status of the service, from that of its pool. Raises KernelError."""

    def end(self) -> None:
        """Leave them to the kernel."""


class NoOwnListeners:
    """For workers that get their sockets from steer."""

    def begin(self, loop: AbstractEventLoop, pool: WorkerPool) -> None:
        pass

    def changed(self, worker: WorkerHandle) -> None:
        pass

    async def reconfigured(self) -> None:
        pass

    def handlers(self) -> Mapping[str, Handler]:
        return {}

    def report(self, pool: schema.Service) -> schema.Service:
        return pool

    def end(self) -> None:
        pass
