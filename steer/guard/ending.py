"""How a guard process ends workers that no controller has adopted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence

from steer.guard.store import PEER_TIMEOUT_S, FdStore, StoredEntry
from steer.linux import family, fork
from steer.values import plural

QUICK_S = 1.0
"""The time between SIGTERM and SIGKILL of a quick stop."""


class Ending:
    """Ends the workers of a service when the time to adopt them is over, or on request.

    Args:
        after_s: the time after which the workers are told to finish.
        say: logs a line.
        before: called before the first worker is told to finish.

    Attributes:
        has_begun: whether the workers have been told to finish.
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
        """The workers that still have a process."""
        return [entry for entry in self._workers() if entry.group]

    def _workers(self) -> Iterable[StoredEntry]:
        return (entry for entry in self._store.entries.values() if entry.is_worker)

    def count(self) -> str:
        return plural(len(self.living), "worker")

    @property
    def is_over(self) -> bool:
        return self.has_begun and not self.living

    @property
    def remaining_s(self) -> float:
        """The time until the workers are told to finish, or killed."""
        return self._due_s - time.monotonic()

    @property
    def needs_polling(self) -> bool:
        """Whether there may be processes whose end no watched pidfd shows."""
        return self.has_begun or any(entry.has_ended for entry in self.living)

    def has_ended(self, entry: StoredEntry) -> None:
        """The first process of this worker has ended."""
        self._fresh.add(entry)

    def look(self) -> None:
        """Forget the process groups of workers that have no process left, as the kernel may use
        their numbers again. If the service is ending, tell the other processes of workers whose
        first process has just ended to finish."""
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
        """Take the step that is due: tell the workers to finish, or kill them. Call this when
        `remaining_s` is 0 or less."""
        if not self.has_begun:
            self._begin(self._store.settings.graceful_timeout_s)
        elif not self._are_killed:
            family.kill([entry.family for entry in self.living])
            self._are_killed = True
            self._due_s = time.monotonic() + PEER_TIMEOUT_S
        else:
            # SIGKILL does not end a process that is blocked in the kernel.
            self._store.entries.clear()

    def stop(self, quick: bool) -> None:
        """Tell the workers to finish now."""
        graceful_s = self._store.settings.graceful_timeout_s
        after_s = min(QUICK_S, graceful_s)
        is_quicker, self._is_quick = quick and not self._is_quick, quick or self._is_quick
        if not self.has_begun:
            self._begin(after_s if quick else graceful_s)
        elif is_quicker:
            self._due_s = min(self._due_s, time.monotonic() + after_s)
            # Workers whose stop signal is SIGTERM have got it already.
            self._terminate([each for each in self.living if each.stop_signal != signal.SIGTERM])

    def _begin(self, after_s: float) -> None:
        self.has_begun = True
        self._due_s = time.monotonic() + after_s
        self._say(f"the controller is gone: ending {self.count()}")
        self._before()
        # Close our copies of the sockets first: else connections would wait at them in vain.
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
    """Kill workers whose registration was never completed."""
    for key, entry in list(store.entries.items()):
        if entry.is_worker and not entry.value:
            entry.family.kill()
            if not entry.has_ended:
                fork.wait_for_end(entry.fds[0], PEER_TIMEOUT_S)
            entry.close()
            del store.entries[key]
