"""Tries again what has failed, and logs each failure once.

Only this module catches any exception, so that none ends a periodic task or the life of a worker.
If the exception names something that the machine lacks (descriptors, processes, memory, space), the
log says so. Any other exception is logged as a bug.
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
_ACTS_MAX = 1000
T = TypeVar("T")


class Retry:
    """Calls functions that may fail.

    Args:
        spare: descriptors that are released during each call.
    """

    def __init__(self, log: Log, spare: Spare) -> None:
        self._log = log
        self.spare = spare
        self._failing: dict[str, str] = {}
        self._loop: AbstractEventLoop

    def watch(self, loop: AbstractEventLoop) -> None:
        """Use this loop to try again."""
        self._loop = loop

    def attempt(self, act: str, do: Callable[[], object]) -> bool:
        """Call `do` once; whether it succeeded.

        Args:
            act: what it does, in words for the log.
        """
        return self.result(act, lambda: (do(), True)[1], False)

    def result(self, act: str, do: Callable[[], T], otherwise: T) -> T:
        """Call `do` once; return its result, or `otherwise` if it fails."""
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
        """Call `do` now, and every AGAIN_S until it succeeds or is not wanted any more."""
        if wanted() and not self.attempt(act, do):
            self._loop.call_later(AGAIN_S, self.until_done, act, do, wanted)

    def failed(self, act: str, error: BaseException) -> None:
        """Log a failure, unless the act failed for the same cause last time."""
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
    """Whether an error has a known cause, such as a lack of memory, and is not a bug in steer."""
    return isinstance(error, OSError | MemoryError | SteerError)


def in_words(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    return str(error) if is_lack(error) else repr(error)


def as_refusal(act: str, error: Exception) -> SteerError:
    """An error as a SteerError, for the user who asked for the act."""
    if isinstance(error, SteerError):
        return error
    return KernelError(act, in_words(error) if is_lack(error) else f"bug in steer: {error!r}")
