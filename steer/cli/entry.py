"""Wraps every command: opens standard streams, and reports errors without a traceback.

It does not import click, as `run` usually does without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING

from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.linux.log import Log


def guarded(perform: Callable[[], object]) -> None:
    """Perform a command, and report any error without a traceback.

    Raises:
        SystemExit: the command failed.
    """
    _open_standard_streams()
    try:
        try:
            _check_arguments(sys.argv[1:])
            perform()
        finally:
            sys.stdout.flush()
    except SteerError as error:
        complain(str(error), error.detail)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the ^C that the terminal shows
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader of our output has closed it
            complain(str(error))
        # Else Python would try to write the rest at exit, and complain again.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - no traceback ever reaches a user
        _report(error)
        sys.exit(1)


def _open_standard_streams() -> None:
    """Open the standard streams that are closed, as a file that is opened later would get their
    number. Escape characters that the terminal's encoding lacks, as they would raise an error."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
            os.set_inheritable(number, True)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raises ConfigError: an argument is not UTF-8. It could not be put into a message or log."""
    with suppress(UnicodeEncodeError):
        "".join(arguments).encode()
        return
    from steer import values
    from steer.errors import ConfigError

    for argument in arguments:
        try:
            values.check_text(argument)
        except values.Invalid as error:
            raise ConfigError(f"read argument {values.shown(argument)}", str(error)) from None


def _report(error: Exception) -> None:
    """Report an error that names something the machine lacks; report any other as a bug."""
    from steer.linux import retry

    if retry.is_lack(error):
        complain(retry.in_words(error))
    else:
        _report_bug(error)


def _report_bug(error: Exception) -> None:
    """Report a bug in one line with its place in the code, or at the log level debug with the
    whole traceback."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    at = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
    what = f"bug in steer: {type(error).__name__}: {error}".replace("\n", " ")
    places = "\n".join(f"{each.filename}:{each.lineno}: {each.line}" for each in frames)
    wanted = "debug" in (os.environ.get("STEER_LOG_LEVEL"), *sys.argv)
    complain(f"{what} ({at}); please report it", places if wanted else "")


_in_force: list[Log] = []


def logs_to(log: Log) -> None:
    """Set the log of the service that this process runs, once its configuration is known."""
    _in_force.append(log)


def log_format() -> str:
    """The configured format of the log. Until the configuration is read, the format that the
    command line or the environment gives."""
    if _in_force:
        return _in_force[0].form
    command, *rest = sys.argv[1:] or [""]
    if command != "run":
        return "text"
    own = rest[: rest.index("--")] if "--" in rest else rest
    pairs = (
        word.split("=", 1) if "=" in word else (word, then) for word, then in pairwise([*own, ""])
    )
    told = [value for name, value in pairs if name == "--log-format"]
    return told[-1] if told else os.environ.get("STEER_LOG_FORMAT", "text")


def complain(message: str, detail: str = "") -> None:
    """Print an error on standard error, as JSON if the log is JSON."""
    lines = [message, *(f"  | {line}" for line in detail.splitlines())]
    if log_format() == "json":
        from steer.linux.log import error_lines

        lines = error_lines(lines)
    else:
        lines[0] = f"steer: {message}"
    print("\n".join(lines), file=sys.stderr, flush=True)
