"""The exceptions. Every error that a user can see is one of these.

An error names the act, the object, the cause and the cure, and has the exit code of the command.
"""

from __future__ import annotations

import errno as numbers
from collections.abc import Mapping
from typing import NamedTuple, Self


def errno_name(error: OSError) -> str:
    """The name in errno(3): "EACCES". If it has none, its number; without an errno, the text."""
    number = error.errno or 0
    return numbers.errorcode.get(number, str(number)) if number else str(error)


def in_words(error: OSError) -> str:
    """The text of strerror(3): "Permission denied"."""
    return error.strerror or str(error)


_NO_CURES: Mapping[int, str] = {}


class Note(NamedTuple):
    """A limitation that is not an error.

    Args:
        found: what is limited, and why.
        cure: what would help, or "" if that is not known.
        errno: the errno of the reason; code decides by it.
    """

    found: str
    cure: str = ""
    errno: int | None = None

    def __str__(self) -> str:
        return f"{self.found}; {self.cure}" if self.cure else self.found


class SteerError(Exception):
    """Something that steer was asked to do and could not do.

    Args:
        what: the act and its object, "bind tcp 127.0.0.1:80".
        cause: why not, "EACCES".
        cure: what would help, or "" if that is not known.
        detail: further lines to show below (a verifier log, the last output of a worker).
        errno: the errno of the cause; code decides by it, and only shows `cause`.
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
        """The error for a failed system call.

        Args:
            cures: cures by errno.
            cure: the cure for every other errno.
            cause: what to show as the cause, instead of the errno.
        """
        number = error.errno or 0
        shown = cause or cls._shown(error)
        return cls(what, shown, cures.get(number, cure), detail, number or None)

    def __reduce__(self) -> tuple[object, ...]:
        """How pickle and copy rebuild the error: its arguments are not those of `__init__`."""
        return type(self).__new__, (type(self), *self.args), vars(self)

    @classmethod
    def like(cls, error: SteerError) -> Self:
        """An error of this type with the fields of another error."""
        return cls(error.what, error.cause, error.cure, error.detail, error.errno)

    def replace(self, **changes: str) -> Self:
        """The same error with other fields: its type, errno and all else stay."""
        # As copy.copy() would, whose import takes time at each start.
        changed = type(self).__new__(type(self), *self.args)
        vars(changed).update(vars(self), **changes)
        changed.args = (str(changed),)
        return changed

    def under(self, act: str, cure: str = "") -> Self:
        """The same error as the cause why a larger act failed.

        Args:
            act: the larger act and its object.
            cure: what to add to the cure of this error.
        """
        cures = "; ".join(each for each in (self.cure, cure) if each)
        return self.replace(what=act, cause=self.note.found, cure=cures)

    @property
    def note(self) -> Note:
        """The same as a note, if it is not treated as an error."""
        return Note(f"{self.what}: {self.cause}", self.cure, self.errno)

    def __str__(self) -> str:
        return str(self.note)


class ConfigError(SteerError):
    """A key or value of the configuration that is not valid."""


class BindError(SteerError):
    """An address that cannot be bound."""

    _shown = staticmethod(errno_name)


class AttachRefused(SteerError):
    """Listeners of another service that steer does not attach to."""


class GroupError(SteerError):
    """What a `ReuseportGroup` cannot do with this slot, with this socket or in this process."""


class ControlError(SteerError):
    """A control socket that cannot be made or reached, or a message that cannot be understood."""


class NotRunning(ControlError):
    """No service with this name answers."""


class Refused(ControlError):
    """A request that a running service refused, or could not carry out.

    Args:
        what: the act and its object, in the words of the client.
        words: the answer of the service.
        exit_code: that of the error in the service, whose text names the act. None if the service
            did not understand the request.
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
    """A service without a controller; `cause` says how long its workers go on."""


class Postponed(ControlError):
    """The controller is being replaced: send the request again to the new one."""


class WorkersFailed(SteerError):
    """No worker has started."""

    exit_code = 3


class AppLoadError(SteerError):
    """The application could not be imported."""

    exit_code = 4


class FallbackRefused(SteerError):
    """A fallback is needed, but --strict was given.

    Args:
        reason: why it is needed.
    """

    exit_code = 5

    def __init__(self, what: str, reason: str, cure: str = "") -> None:
        self.reason = reason
        super().__init__(what, f"strict is set, and {reason}", cure)


class KernelError(SteerError):
    """A system call that the kernel refused; steer may fall back to another backend."""

    _shown = staticmethod(errno_name)


class NoThread(KernelError):
    """The machine has no room for one more thread."""


class Uncounted(KernelError):
    """Open connections are not counted, and `auto` can select a policy that does not need them."""


class VerifierError(KernelError):
    """The verifier refused a program.

    Args:
        detail: the important lines of its log.
        log: the whole log.
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
    """A policy that does not compile, or a machine without a compiler."""

    _shown = staticmethod(in_words)


class NoCompiler(CompileError):
    """This machine has no compiler; the policy may be correct."""
