"""A worker without a process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from steer.linux.family import Family

FIRST = 1 << 23
"""More than any process has for a number (PID_MAX_LIMIT of include/linux/threads.h)."""
DEADLINE_S = 60.0


class FakeProcess:
    """A worker that ends when the test says so."""

    def __init__(self, pid: int, told_to_finish: bool) -> None:
        self.pid, self.told_to_finish = pid, told_to_finish
        self.family = Family(pid)
        self.is_open, self.is_killed = True, False
        self.left_behind: Sequence[int] = ()
        self.asked_to_end: list[int] = []
        self.first_ends: Callable[[], None]

    def watch(self, _loop: object, ended: Callable[[], None]) -> None:
        self.first_ends = ended

    def signal_others(self, pids: Iterable[int]) -> None:
        self.asked_to_end += pids

    def kill_group(self) -> None:
        self.is_killed = True

    def let_go(self) -> int:
        assert self.is_open
        self.is_open = False
        return 0
