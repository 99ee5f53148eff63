"""How a guard process ends workers that no controller has adopted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence

from steer.guard.store import PATIENCE_S, FdStore, StoredEntry
from steer.linux import family, fork
from steer.values import plural

QUICK_S = 1.0
"""From SIGTERM to SIGKILL when it has to be quick."""


class Ending:
    """When the workers of a service end, and how.

    Args:
        after_s: they are ended after that time.
        say: logs a line.
        before: called before the first is told to end.

    Attributes:
        has_begun: whether they have been told.
    """

    def __init__(
        self,
        store: FdStore,
        after_s: float,
        say: Callable[[str], None],
        before: Callable[[], None],
    ) -> None:
        self.has_begun = False
        self._store = store
        self._due_s = time.monotonic() + after_s
        self._say = say
        self._before = before
        self._is_quick = self._are_killed = False
        self._fresh: set[StoredEntry] = set()

    @property
    def living(self) -> list[StoredEntry]:
        """Workers of whom somebody is left."""
        return [entry for entry in self._workers() if entry.group]

    def _workers(self) -> Iterable[StoredEntry]:
        return (entry for entry in self._store.entries.values() if entry.is_worker)

    def count(self) -> str:
        return plural(len(self.living), "worker")

    @property
    def is_over(self) -> bool:
        return self.has_begun and not self.living

    @property
    def left_s(self) -> float:
        """Until something is due: that they are told, or killed."""
        return self._due_s - time.monotonic()

    @property
    def wants_looks(self) -> bool:
        """Whether somebody of whom it is not told may end."""
        return self.has_begun or any(entry.has_ended for entry in self.living)

    def has_ended(self, entry: StoredEntry) -> None:
        """The first process of this worker."""
        self._fresh.add(entry)

    def look(self) -> None:
        """Forget workers of whom nobody is left, as their number may then become another's. Who
        is left of those that have just ended is told to end, if all are."""
        living = self.living
        ended = [entry for entry in living if entry.has_ended]
        groups = [entry.group for entry in living]
        found = family.others([entry.family for entry in ended], groups) if ended else []
        for entry, others in zip(ended, found, strict=True):
            if not others:
                entry.group = 0
            elif self.has_begun and entry in self._fresh:
                entry.terminate_others(self._is_quick, others)
        self._fresh.clear()

    def go_on(self) -> None:
        """To be called when nothing is `left_s`."""
        if not self.has_begun:
            self._begin(self._store.settings.graceful_timeout_s)
        elif not self._are_killed:
            family.kill([entry.family for entry in self.living])
            self._are_killed = True
            self._due_s = time.monotonic() + PATIENCE_S
        else:
            # Not even SIGKILL ends what waits in the kernel.
            self._store.entries.clear()

    def stop(self, quick: bool) -> None:
        """Now."""
        graceful_s = self._store.settings.graceful_timeout_s
        after_s = min(QUICK_S, graceful_s)
        hurry, self._is_quick = quick and not self._is_quick, quick or self._is_quick
        if not self.has_begun:
            self._begin(after_s if quick else graceful_s)
        elif hurry:
            self._due_s = min(self._due_s, time.monotonic() + after_s)
            # Those whose signal is SIGTERM were told so, and once is enough.
            self._terminate([each for each in self.living if each.stop_signal != signal.SIGTERM])

    def _begin(self, after_s: float) -> None:
        self.has_begun = True
        self._due_s = time.monotonic() + after_s
        self._say(f"the controller is gone: ending {self.count()}")
        self._before()
        # First, or what they no longer listen for would still get in, and wait for nothing.
        for entry in self._store.entries.values():
            entry.let_go()
        self._terminate(self.living)

    def _terminate(self, workers: Sequence[StoredEntry]) -> None:
        for entry in workers:
            if not entry.has_ended:
                entry.terminate(self._is_quick)
        self._fresh.update(entry for entry in workers if entry.has_ended)
        self.look()


def end_unfinished(store: FdStore) -> None:
    """Kill workers whose registration was never completed: it is not known what they are for."""
    for key, entry in list(store.entries.items()):
        if entry.is_worker and not entry.value:
            entry.family.kill()
            if not entry.has_ended:
                fork.wait_for_end(entry.fds[0], PATIENCE_S)
            entry.close()
            del store.entries[key]
