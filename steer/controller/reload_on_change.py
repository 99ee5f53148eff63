"""Reloads the service when a Python file of the application changes, for development.

watchfiles does the watching (inotify(7)). It is imported only if `reload_on_change` is set.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from steer.config.service import Service
from steer.controller.tasks import Change
from steer.errors import ConfigError, SteerError
from steer.linux.log import Log
from steer.values import plural

_TOGETHER_MS = 200
"""Changes within this time are one: editors and version control write several files."""
_NAMED_MAX = 3


def refuse_missing(service: Service) -> None:
    """Raises ConfigError: files are to be watched, and watchfiles is not installed."""
    if not service.reload_on_change:
        return
    try:
        import watchfiles  # noqa: F401
    except ImportError as error:
        cure = "pip install 'steer-reuseport[reload]'"
        raise ConfigError("reload_on_change", f"it needs watchfiles: {error}", cure) from None


class ReloadOnChange:
    """Watches the directory in which the workers of one service run.

    Args:
        reload: reloads the service.
        begin: begins a task whose error is logged.
    """

    def __init__(
        self,
        reload: Callable[[], Awaitable[object]],
        begin: Callable[[str, Change], asyncio.Task[None]],
        log: Log,
    ) -> None:
        self._reload = reload
        self._begin = begin
        self._log = log
        self._told = ""
        self._watching: asyncio.Task[None] | None = None
        self._directory = ""

    def follow(self, service: Service) -> None:
        """Watch as the configuration says from here on."""
        directory = (service.chdir or os.curdir) if service.reload_on_change else ""
        is_watching = self._watching is not None and not self._watching.done()
        if directory == self._directory and (is_watching or not directory):
            return
        self.end()
        self._directory = directory
        if directory:
            self._watching = asyncio.create_task(self._watch(Path(directory).absolute()))

    def end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _watch(self, directory: Path) -> None:
        try:
            refuse_missing(Service(reload_on_change=True))
            from watchfiles import PythonFilter, awatch

            self._log.info("watching the Python files in %s", directory)
            found = awatch(
                directory,
                watch_filter=PythonFilter(),
                debounce=_TOGETHER_MS,
                ignore_permission_denied=True,
            )
            async for changes in found:
                paths = sorted({os.path.relpath(path, directory) for _, path in changes})
                self._log.info("%s changed; reloading", _named(paths))
                await self._begin("reload", self._reload_once)
        except (OSError, ConfigError) as error:
            self._log.error("not watching %s any more: %s", directory, error)

    async def _reload_once(self) -> None:
        """Reload. An error that is the same as last time is not told in full again."""
        try:
            await self._reload()
        except SteerError as error:
            told = f"{error}\n{error.detail}"
            if told == self._told:
                self._log.error("cannot reload: as before")
                return
            self._told = told
            raise
        self._told = ""


def _named(paths: Collection[str]) -> str:
    if len(paths) > _NAMED_MAX:
        return plural(len(paths), "file")
    return ", ".join(paths)
