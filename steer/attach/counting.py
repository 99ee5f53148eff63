"""Open connections of sockets that were made in cgroups of others."""

from __future__ import annotations

from collections.abc import Iterable

from steer.backends.connections import Counting
from steer.errors import KernelError
from steer.linux import cgroup
from steer.loader import programs


class CountingElsewhere(Counting):
    """Counts in the cgroups that it is told of, not in ours."""

    def _watch_ours(self) -> None:
        pass

    def on(self, cgroups: Iterable[int]) -> None:
        """Also in these, given by their inodes. Where one refuses nothing is counted at all: what
        counts only some of the sockets would send everything to the others."""
        if self._owners is None:
            return
        try:
            for number in cgroups:
                if number not in self._cgroups:
                    with cgroup.opened(number) as directory:
                        self._attached.append(programs.Link(self._attached[0], directory))
                    self._cgroups.append(number)
        except KernelError as error:
            self._stop()
            self.why_not = error.note
