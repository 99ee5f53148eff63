"""A server with many workers, watched in ways that cost it nothing.

That a worker is ready is a line in the server's log, and that it has ended an event of its pidfd.
To look through /proc, or to ask, again and again would take longer than what is measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from bench import peers, servers, victims
from bench.peers import Peer, Running, Site
from bench.victims import Stop
from steer.control import client, find
from steer.errors import ControlError

LIMIT_S = 120.0
"""No step is waited for longer."""
_LOOK_AGAIN_S = 0.002


class TooLong(Exception):
    """A step was given up after LIMIT_S."""


@dataclass(frozen=True)
class Contender:
    """A server that can have any number of workers.

    Args:
        command: what to execute, for so many workers.
        ready: what its log says of each worker that is ready; `pid` in it is the worker's, and
            not needed of steer, which can be asked.
        worker_mb: what a worker takes, for who has to know whether there is room.
        tool: the `steer` command; None: it is not steer.
        most: workers that it is measured with; more would take too long.
        most_again: that it is measured with more than once.
        is_slow: replaces one worker after the other, which takes hours under load.
    """

    name: str
    command: Callable[[Site, int], list[str]]
    ready: re.Pattern[bytes]
    worker_mb: float
    tool: str | None = None
    most: int = sys.maxsize
    most_again: int = sys.maxsize
    is_slow: bool = False


class Crowd:
    """A contender with so many workers, started a moment ago."""

    def __init__(self, contender: Contender, workers: int, running: Running) -> None:
        self.contender, self.workers = contender, workers
        self.server, self._site = running.server, running.site
        self._log = _Log(running.site.log, contender.ready)

    @property
    def port(self) -> int:
        return self._site.port

    def wait_ready(self, more: int) -> None:
        """Until so many more workers are ready. Raises TooLong, SteerError: it has ended."""
        wanted = self._log.count + more
        end_s = time.monotonic() + LIMIT_S
        while self._log.read() < wanted:
            if self.server.process.poll() is not None:
                raise self.server.failure(f"exit status {self.server.process.returncode}")
            if time.monotonic() > end_s:
                raise TooLong
            time.sleep(_LOOK_AGAIN_S)

    def pids(self) -> list[int]:
        """Of the workers, the oldest first. One that has ended may still be listed as stopping."""
        if self.contender.tool:
            workers = self.ask("status")["service"]["workers"]
            by_age = sorted(workers, key=_age_s, reverse=True)
            return [each["pid"] for each in by_age if each["pid"] and each["state"] != "stopping"]
        self._log.read()
        return self._log.pids[-self.workers :]

    def reload(self, then: Callable[[], object] = lambda: None) -> float:
        """Until all new workers are ready and all old ones have gone; how many seconds it took.

        Args:
            then: called when the first is so.

        Raises:
            TooLong
        """
        with Leaving(self.pids()) as old, ThreadPoolExecutor(1) as pool:
            begun_s = time.monotonic()
            gone = pool.submit(old.wait)
            self._replace_all()
            ready_s = time.monotonic()
            then()
            return max(ready_s, gone.result()) - begun_s

    def kill_one(self) -> tuple[Stop, float]:
        """The oldest. What it had accepted, and how many seconds until another is ready.

        A younger one might have been started for one that was killed, and is waited with.

        Raises:
            TooLong
        """
        with victims.victim(self.pids()[0]) as victim:
            stop = victim.stop(self.port)
            self._log.read()
            begun_s = time.monotonic()
            victim.kill()
            self.wait_ready(1)
        return stop, time.monotonic() - begun_s

    def stop(self) -> float:
        """Until nobody is left; how many seconds it took. Raises TooLong."""
        with Leaving([*self.pids(), self.server.pid]) as all_of_them:
            begun_s = time.monotonic()
            self.server.process.terminate()
            return all_of_them.wait() - begun_s

    def ask(self, command: str, **more: Any) -> dict[str, Any]:
        """Of steer, at its control socket. Raises TooLong, ControlError."""
        path = find.locate(servers.name(self.port), None, self._site.environment)
        begun_s = time.monotonic()
        try:
            return client.ask(path, command, timeout_s=LIMIT_S, **more)
        except ControlError:
            if time.monotonic() - begun_s < LIMIT_S:
                raise
            raise TooLong from None

    def status_command(self) -> tuple[list[str], dict[str, str]]:
        """What a user would type to see it, and in which environment."""
        assert self.contender.tool
        command = [self.contender.tool, "status", servers.name(self.port)]
        return command, dict(self._site.environment)

    def _replace_all(self) -> None:
        if self.contender.tool:
            self.ask("reload")
            return
        self._log.read()
        os.kill(self.server.pid, signal.SIGHUP)
        self.wait_ready(self.workers)


@contextlib.contextmanager
def crowd(contender: Contender, workers: int, port: int) -> Iterator[Crowd]:
    """Start one; nothing of it is left after the block."""
    command = partial(_command, contender, workers)
    peer = Peer(contender.name, command, None, None, lambda _: [], bool(contender.tool))
    with peers.started(peer, port) as running:
        yield Crowd(contender, workers, running)


def _command(contender: Contender, workers: int, site: Site) -> list[str]:
    return contender.command(site, workers)


def _age_s(worker: Mapping[str, Any]) -> float:
    return worker["uptime_s"] or 0.0


class Leaving:
    """Processes, until the last of them has ended."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._poll = select.poll()
        self._left = 0
        with ExitStack() as stack:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(pid)
                    stack.callback(os.close, pidfd)
                    self._poll.register(pidfd, select.POLLIN)
                    self._left += 1
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(self) -> float:
        """When it was so, by CLOCK_MONOTONIC. Raises TooLong."""
        end_s = time.monotonic() + LIMIT_S
        while self._left:
            ended = self._poll.poll(1000 * max(end_s - time.monotonic(), 0))
            if not ended:
                raise TooLong
            for pidfd, _ in ended:
                self._poll.unregister(pidfd)
                self._left -= 1
        return time.monotonic()


class _Log:
    """What a server has written so far, as far as it speaks of workers that are ready.

    Attributes:
        count: of them.
        pids: of them, in their order, where they are told.
    """

    def __init__(self, path: Path, ready: re.Pattern[bytes]) -> None:
        self._path, self._ready = path, ready
        self._offset = 0
        self.count = 0
        self.pids: list[int] = []

    def read(self) -> int:
        """What is new; `count` then."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for match in self._ready.finditer(whole):
            self.count += 1
            if "pid" in self._ready.groupindex:
                self.pids.append(int(match["pid"]))
        return self.count
