"""The template processes of a service: one for each generation whose workers it forks.

While a generation has none that is ready, its workers are forked by the controller and load the
application themselves.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from steer.child.launch import NewWorker
from steer.child.preload import Preload
from steer.config.plan import Generation
from steer.errors import SteerError
from steer.linux import identity
from steer.linux.log import Log
from steer.workers.lifecycle import STABLE_S, backoff_s
from steer.workers.process import TemplateLost, fork_from_nothing
from steer.workers.template import Template

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

_INSTEAD = "new workers load the application themselves"


class Templates:
    """Starts and ends template processes, and starts them again when they end by themselves.

    Args:
        files: the limits on open files that the controller was started with.

    Attributes:
        first: the template process that was started before there was a loop.
    """

    def __init__(self, log: Log, files: tuple[int, int]) -> None:
        self.first: Template
        self._log = log
        self._files = files
        self._by_number: dict[int, Template] = {}
        self._current: Generation | None = None
        self._problem = "it loads the application"
        self._failures = 0
        self._loop: AbstractEventLoop
        self._is_over: Callable[[], bool]

    def begin(self, generation: Generation) -> None:
        """Start the first template process, before there is a loop. Raises KernelError."""
        self._current = generation
        self.first = self._by_number[generation.number] = self._make(generation)

    def watch(self, loop: AbstractEventLoop, is_over: Callable[[], bool]) -> None:
        """Use this loop from here on.

        Args:
            is_over: whether no worker is started any more.
        """
        self._loop, self._is_over = loop, is_over
        if self._current is not None:
            self._watch(self._current, self.first)

    @asynccontextmanager
    async def renewing(self, generation: Generation) -> AsyncIterator[None]:
        """Start a template process for a new generation, if that is to have one, and wait until it
        is ready. After the block it is the only one; if the block fails, the former one stays.

        Raises:
            AppLoadError, WorkersFailed: it cannot load the application.
            KernelError: no more processes, or no more files.
        """
        import asyncio  # not yet needed when the first template process is started

        number = generation.number
        try:
            if generation.plan.service.preload:
                await asyncio.shield(self._add(generation).loaded)
            yield
        except BaseException:
            self._drop(number)
            raise
        self._current, self._failures = generation, 0
        for each in [each for each in self._by_number if each != number]:
            self._drop(each)

    def fork_workers(self, new: Sequence[NewWorker]) -> Sequence[tuple[int, int]]:
        """See `process.ForkWorkers`: by the template processes of their generations."""
        forked: list[tuple[int, int]] = []
        for number, group in groupby(new, lambda each: each.launch.generation):
            template = self._by_number.get(number)
            if template is None or not template.is_ready:
                forked += fork_from_nothing(list(group))
                continue
            try:
                forked += template.fork_workers(list(group))
            except TemplateLost as error:
                self._log.warning("killed template process %d: %s", template.pid, error)
                raise
        return forked

    @property
    def notes(self) -> Sequence[str]:
        """What users should know now."""
        current = self._current
        if current is None or not current.plan.service.preload:
            return ()
        template = self._by_number.get(current.number)
        if template is not None and template.is_ready:
            return ()
        return (f"no template process is ready: {self._problem}; {_INSTEAD}",)

    def close(self) -> None:
        """End all of them."""
        for number in list(self._by_number):
            self._drop(number)

    def _make(self, generation: Generation) -> Template:
        plan = generation.plan
        service = plan.service
        who = identity.identity(service.user, service.group)
        return Template(Preload(service, plan.name, who, self._files, len(plan.binds)))

    def _add(self, generation: Generation) -> Template:
        template = self._by_number[generation.number] = self._make(generation)
        self._watch(generation, template)
        return template

    def _watch(self, generation: Generation, template: Template) -> None:
        template.watch(self._loop, partial(self._ended, generation, template))
        template.loaded.add_done_callback(partial(self._loaded, generation, template))

    def _drop(self, number: int) -> None:
        if template := self._by_number.pop(number, None):
            template.close()

    def _loaded(self, generation: Generation, template: Template, loaded: Future[None]) -> None:
        error = loaded.exception()
        if error is not None:
            self._problem = str(error)
            return
        took_s = time.monotonic() - template.began_s
        app = generation.plan.service.app
        self._log.info("loaded %s in %.2f s in template process %d", app, took_s, template.pid)

    def _ended(self, generation: Generation, template: Template, how: str) -> None:
        """It has ended by itself. Whoever waits for it learns that first, and may stop the
        service."""
        self._loop.call_soon(self._replace, generation, template, how)

    def _replace(self, generation: Generation, template: Template, how: str) -> None:
        """Start another one for a generation that is in force."""
        error = template.loaded.exception()
        self._problem = str(error or f"it ended: {how}")
        if generation is not self._current or self._is_over():
            return
        has_lived = time.monotonic() - template.began_s >= STABLE_S
        self._failures = 1 if error is None and has_lived else self._failures + 1
        self._log.warning("no template process: %s; %s", self._problem, _INSTEAD)
        after_s = backoff_s(self._failures, served=False)
        self._loop.call_later(after_s, self._again, generation)

    def _again(self, generation: Generation) -> None:
        if generation is not self._current or self._is_over():
            return
        try:
            self._add(generation)
        except SteerError as error:
            self._failures += 1
            self._log.warning("no template process: %s; %s", error, _INSTEAD)
            after_s = backoff_s(self._failures, served=False)
            self._loop.call_later(after_s, self._again, generation)
