"""The exception tree. Every error a user can meet is one of these.

An error names the act, the object, the cause and the cure, and carries the
exit code that the command ends with.
"""

from __future__ import annotations

import errno as numbers
from collections.abc import Mapping
from typing import NamedTuple, Self


def errno_name(error: OSError) -> str:
    """As errno(3) has it: "EACCES". Where there is no name the number, else what the error says."""
    number = error.errno or 0
    return numbers.errorcode.get(number, str(number)) if number else str(error)


def in_words(error: OSError) -> str:
    """As strerror(3) has it: "Permission denied"."""
    return error.strerror or str(error)


_NO_CURES: Mapping[int, str] = {}


class Note(NamedTuple):
    """Something that is no error, but less than there could be.

    Args:
        found: what, and why.
        cure: what would help, or "" where nothing is known.
        errno: the kernel's number for why, to decide by.
    """

    found: str
    cure: str = ""
    errno: int | None = None

    def __str__(self) -> str:
        return f"{self.found}; {self.cure}" if self.cure else self.found


class SteerError(Exception):
    """Something steer was asked to do and could not.

    Args:
        what: the act and its object, "bind tcp 127.0.0.1:80".
        cause: why not, "EACCES".
        cure: what would help, or "" where nothing is known.
        detail: further lines to show below (a verifier log, a worker's last words).
        errno: the kernel's number for the cause, to decide by; `cause` is only to be shown.
    """

    exit_code = 1
    _shown = staticmethod(in_words)
    """How `from_oserror` shows a cause."""

    def __init__(
        self,
        what: str,
        cause: str,
        cure: str = "",
        detail: str = "",
        errno: int | None = None,
    ) -> None:
        self.what = what
        self.cause = cause
        self.cure = cure
        self.detail = detail
        self.errno = errno
        super().__init__(str(self))

    @classmethod
    def from_oserror(
        cls,
        what: str,
        error: OSError,
        cures: Mapping[int, str] = _NO_CURES,
        *,
        cure: str = "",
        cause: str = "",
        detail: str = "",
    ) -> Self:
        """The error for a system call that failed.

        Args:
            cures: by errno.
            cure: for every other errno.
            cause: what to show as the cause, instead of the errno.
        """
        number = error.errno or 0
        shown = cause or cls._shown(error)
        return cls(what, shown, cures.get(number, cure), detail, number or None)

    @property
    def note(self) -> Note:
        """The same, where it is no failure."""
        return Note(f"{self.what}: {self.cause}", self.cure, self.errno)

    def __str__(self) -> str:
        return str(self.note)


class ConfigError(SteerError):
    """A key or value of the configuration that cannot be."""


class BindError(SteerError):
    """An address that cannot be listened on."""

    _shown = staticmethod(errno_name)


class GroupError(SteerError):
    """What a `ReuseportGroup` cannot do with this slot, with this socket or in this process."""


class ControlError(SteerError):
    """A control socket that cannot be made, reached or understood."""


class NotRunning(ControlError):
    """No service of that name answers."""


class Refused(ControlError):
    """What a running service would not do, or could not.

    Args:
        what: the act and its object, as the asker names it.
        words: the service's.
        exit_code: of the error the service met: its words then name the act themselves.
            None where it met none, as it did not understand.
    """

    def __init__(
        self, what: str, words: str, detail: str = "", exit_code: int | None = None
    ) -> None:
        self._whole = exit_code is not None
        self.exit_code = exit_code or ControlError.exit_code
        super().__init__(what, words, detail=detail)

    def __str__(self) -> str:
        return self.cause if self._whole else super().__str__()


class Orphaned(Refused):
    """A service whose controller is gone; `cause` says till when its workers go on."""


class Postponed(ControlError):
    """The controller is about to be another, which is to be asked again."""


class WorkersFailed(SteerError):
    """No worker came up."""

    exit_code = 3


class AppLoadError(SteerError):
    """The application could not be imported."""

    exit_code = 4


class FallbackRefused(SteerError):
    """--strict, and a fallback would be needed."""

    exit_code = 5


class KernelError(SteerError):
    """A system call that the kernel refused: a reason to step down the ladder."""

    _shown = staticmethod(errno_name)


class Uncounted(KernelError):
    """Nobody counts open connections, and another policy than one that goes by them will do."""


class VerifierError(KernelError):
    """The verifier refused a program.

    Args:
        detail: what matters of its log.
        log: the whole of it.
    """

    def __init__(
        self,
        what: str,
        cause: str,
        cure: str = "",
        detail: str = "",
        errno: int | None = None,
        log: str = "",
    ) -> None:
        super().__init__(what, cause, cure, detail, errno)
        self.log = log


class CompileError(KernelError):
    """A policy that does not compile, or nothing here to compile it with."""

    _shown = staticmethod(in_words)


class NoCompiler(CompileError):
    """There is none here; the policy may be right."""
