"""What has to go on, whatever the machine lacks: a failure is logged once, and it is tried again.

Here, and nowhere else, any exception is caught: none ends a periodic task or a worker's life.
One that names something the machine lacks (no descriptor, process, memory or space) is told as
that, and any other as a bug.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from steer.errors import KernelError, SteerError
from steer.linux.log import Log
from steer.linux.spare import Spare

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

AGAIN_S = 1.0
_NO_THREAD = "can't start new thread"
"""In the RuntimeError of Python's threading."""
_ACTS_MAX = 1000
T = TypeVar("T")


class Retry:
    """Does things that may fail.

    Args:
        spare: descriptors that are lent to whatever is done here, and to whatever else borrows
            them.
    """

    def __init__(self, log: Log, spare: Spare) -> None:
        self._log = log
        self.spare = spare
        self._failing: dict[str, str] = {}
        self._loop: AbstractEventLoop

    def watch(self, loop: AbstractEventLoop) -> None:
        """From here on there is a loop to try again in."""
        self._loop = loop

    def attempt(self, act: str, do: Callable[[], object]) -> bool:
        """Do it now; whether it was done.

        Args:
            act: in words, for the log.
        """
        return self.result(act, lambda: (do(), True)[1], False)

    def result(self, act: str, do: Callable[[], T], otherwise: T) -> T:
        """What comes of it now, or `otherwise` if it failed."""
        try:
            with self.spare.lent():
                found = do()
        except Exception as error:  # noqa: BLE001 - see above
            self.failed(act, error)
            return otherwise
        self._failing.pop(act, None)
        return found

    def until_done(
        self, act: str, do: Callable[[], object], wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Do it now, and if that fails again every AGAIN_S as long as it is wanted."""
        if wanted() and not self.attempt(act, do):
            self._loop.call_later(AGAIN_S, self.until_done, act, do, wanted)

    def failed(self, act: str, error: BaseException) -> None:
        """Log it, unless the same act failed for the same cause the last time."""
        cause = in_words(error)
        if self._failing.get(act) == cause:
            return
        if len(self._failing) >= _ACTS_MAX:
            self._failing.clear()
        self._failing[act] = cause
        with suppress(MemoryError):
            if is_lack(error):
                self._log.error("%s: %s; it is tried again", act, cause)
            else:
                self._log.error("bug in steer: %s: %s; it is tried again", act, cause)
                import traceback

                self._log.debug("%s", "".join(traceback.format_exception(error)))


def is_lack(error: BaseException) -> bool:
    """Whether it tells of the machine, or of something else that is known, and not of a bug."""
    no_thread = isinstance(error, RuntimeError) and str(error) == _NO_THREAD
    return no_thread or isinstance(error, OSError | MemoryError | SteerError)


def in_words(error: BaseException) -> str:
    """What it says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    if str(error) == _NO_THREAD:
        return "no more threads; raise the limit on processes (ulimit -u, TasksMax=) or on memory"
    return str(error) if is_lack(error) else repr(error)


def as_refusal(act: str, error: Exception) -> SteerError:
    """The same, for who asked for the act."""
    if isinstance(error, SteerError):
        return error
    return KernelError(act, in_words(error) if is_lack(error) else f"bug in steer: {error!r}")
