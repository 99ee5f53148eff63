"""Template processes in the life of a controller: at its start, in its loop, at a reload.

Imported only for services that preload.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

from steer.config.plan import Generation
from steer.controller.controller import Controller
from steer.errors import SteerError
from steer.workers.pool import WorkerPool
from steer.workers.templates import Templates

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future


def begin(service: Controller, generation: Generation) -> Templates:
    """Start the template process of the first generation of this controller. Raises KernelError:
    no more processes, or no more files."""
    service.templates = _make(service)
    service.templates.begin(generation)
    return service.templates


def watch(service: Controller, loop: AbstractEventLoop) -> None:
    """Watch the template process in this loop. Workers that wait for it are started once it is
    ready; if it cannot load the application, the service does not start."""
    templates, pool = service.templates, service.pool
    assert templates is not None
    _use(service, templates, loop)
    if pool.start_queue.is_paused:
        templates.first.loaded.add_done_callback(partial(_loaded, pool))


def renewing(
    service: Controller, loop: AbstractEventLoop, generation: Generation
) -> AbstractAsyncContextManager[None]:
    """See `Templates.renewing`."""
    if service.templates is None:
        service.templates = _make(service)
        _use(service, service.templates, loop)
    return service.templates.renewing(generation)


def _make(service: Controller) -> Templates:
    return Templates(service.log, service.file_limit.inherited)


def _use(service: Controller, templates: Templates, loop: AbstractEventLoop) -> None:
    templates.watch(loop, partial(_is_over, service.pool))
    service.pool.spawner.fork_workers = templates.fork_workers


def _is_over(pool: WorkerPool) -> bool:
    return pool.shutdown.has_begun or pool.startup.has_failed


def _loaded(pool: WorkerPool, loaded: Future[None]) -> None:
    error = loaded.exception()
    if isinstance(error, SteerError):
        pool.startup.refuse(error)
    else:
        pool.resume_starts()
