"""Ends the workers when the controller cannot: one small process that outlives it.

PR_SET_PDEATHSIG is quicker, but reaches only a worker's first process, is forgotten
when that becomes somebody else, and can be ignored. The guard holds the other end of
a pipe on which the controller says which process groups are its workers'. When the
pipe ends, so has the controller, however it did.
"""

from __future__ import annotations

import os
import select
import signal
import time

from steer.kernel import process

_LOOK_S = 0.1


class Guard:
    """The controller's side.

    Args:
        graceful_timeout_s: from SIGTERM to SIGKILL, once the controller is gone.

    Raises:
        OSError: no more processes; see `process.fork_error`.
    """

    def __init__(self, graceful_timeout_s: float) -> None:
        ours, self._pipe = os.pipe()
        try:
            self.pid, pidfd = process.fork(lambda: _main(ours, graceful_timeout_s))
        except OSError:
            os.close(self._pipe)
            raise
        finally:
            os.close(ours)
        os.close(pidfd)

    def add(self, group: int) -> None:
        self._say(b"+", group)

    def remove(self, group: int) -> None:
        """Before the process is waited for: until then its number is not another's."""
        self._say(b"-", group)

    def close(self) -> None:
        """Nothing is left to guard."""
        os.close(self._pipe)
        os.waitpid(self.pid, 0)

    def _say(self, sign: bytes, group: int) -> None:
        try:
            os.write(self._pipe, b"%c%d\n" % (sign, group))
        except BrokenPipeError:
            return  # somebody has killed it; PR_SET_PDEATHSIG is what remains


def _main(pipe: int, graceful_timeout_s: float) -> int:
    process.keep_only([pipe])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups = _until_it_ends(pipe)
    _signal_all(groups, signal.SIGTERM)
    end_s = time.monotonic() + graceful_timeout_s
    while _signal_all(groups, 0) and time.monotonic() < end_s:
        select.select([], [], [], _LOOK_S)
    _signal_all(groups, signal.SIGKILL)
    return 0


def _until_it_ends(pipe: int) -> set[int]:
    """The groups there are when the controller goes."""
    groups: set[int] = set()
    with os.fdopen(pipe, "rb") as lines:
        for line in lines:
            change = groups.add if line[:1] == b"+" else groups.discard
            change(int(line[1:]))
    return groups


def _signal_all(groups: set[int], number: int) -> bool:
    """Whether any of them is still there; those that are not are forgotten."""
    for group in list(groups):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            groups.discard(group)
        except PermissionError:
            continue
    return bool(groups)
