"""Runs a function in a forked child, and ends the child with its result."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from steer.linux.stdio import write_stderr


def exit_with(child: Callable[[], int]) -> NoReturn:
    """Run a child and exit with the code that it returns. This never returns into the stack of the
    parent, even if the child has replaced functions of Python that are used here."""
    code = 1
    try:
        code = _run(child)
        flush()
    finally:
        os._exit(code)


def _run(child: Callable[[], int]) -> int:
    """Run a child; its exit code from 0 to 255."""
    try:
        return child()
    except SystemExit as done:
        return _exit_code(done.code)
    except BaseException as error:  # noqa: BLE001 - shown, and this process exits
        _show(error)
        return 1


def _exit_code(value: object) -> int:
    """The exit code for the argument of SystemExit, as in Python itself: what is not a number is
    shown, and the code is 1.

    A number too large for a C long is -1 (handle_system_exit() of CPython's pythonrun.c).
    """
    if value is None or isinstance(value, int):
        number = value or 0
        return number & 0xFF if -(1 << 63) <= number < 1 << 63 else 0xFF
    _complain(f"{value}\n")
    return 1


def _show(error: BaseException) -> None:
    """Show an exception as Python does, or on descriptor 2 if that fails."""
    try:
        if _takes_text(sys.stderr):
            sys.excepthook(type(error), error, error.__traceback__)
            return
    except Exception:  # noqa: BLE001 - the application may have replaced the hook
        pass
    import traceback

    _complain("".join(traceback.format_exception(error)))


def _complain(text: str) -> None:
    """Write to sys.stderr, or to descriptor 2 if the application has replaced that."""
    if _takes_text(sys.stderr):
        sys.stderr.write(text)
    else:
        write_stderr(text.encode(errors="backslashreplace"))


def _takes_text(stream: object) -> bool:
    try:
        stream.write("")  # type: ignore[attr-defined]
        stream.flush()  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - it may be any object
        return False
    return True


def flush() -> None:
    """Flush the standard streams, and ignore errors: the application may have replaced them."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]
