"""The controller's standard output and standard error: opens log files again, and keeps a full pipe
from blocking the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from steer.guard.client import GuardClient
from steer.linux import output, stdio
from steer.linux.log import Log


class StandardStreams:
    """The standard streams of this process.

    Args:
        files: the files that they go to, by descriptor; None: the descriptor is no file.
        guard: the guard, whose process writes to the same files.
    """

    def __init__(self, files: Mapping[int, str | None], guard: GuardClient, log: Log) -> None:
        self._files = files
        self._guard = guard
        self._log = log

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on, if standard error is full, write the rest when it is writable again."""

        def write_on() -> None:
            if output.stderr.flush():
                loop.remove_writer(output.stderr.fileno())

        output.stderr.watch(lambda: loop.add_writer(output.stderr.fileno(), write_on))

    def reopen(self) -> None:
        """Open the files again: logrotate(8) has moved them."""
        files = {number: path for number, path in self._files.items() if path}
        if not files:
            self._log.info("SIGUSR1: output goes to no file, so no file is opened again")
        for number, path in files.items():
            try:
                stdio.reopen(number, path)
            except OSError as error:
                self._log.error("open %s again: %s", path, error.strerror)
        self._guard.reopen()
        if 1 in files and not stdio.is_the_log(1):
            words = "running workers write to the old file until a reload"
            self._log.info("standard output goes to %s again; %s", files[1], words)
