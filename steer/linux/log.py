"""The controller's log on standard error, in gunicorn's text format or as JSON.

It does not use `logging` of the standard library, whose import takes a tenth of a start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import msgspec

from steer.linux import output
from steer.values import plural

LEVELS = ("debug", "info", "warning", "error")

_DROPPED = "missing here: %s, as nobody read standard error and too many waited"


class Log:
    """Writes whole lines.

    Args:
        level: the lowest of LEVELS that is written.
        form: "text" or "json".

    Attributes:
        form: the current format.
    """

    def __init__(self, level: str, form: str) -> None:
        self.configure(level, form)

    def configure(self, level: str, form: str) -> None:
        """Change level and format."""
        self._least = LEVELS.index(level)
        self.form = form
        self._write = write = _json if form == "json" else _text
        output.stderr.describe = lambda count: (
            write("warning", _DROPPED % plural(count, "line")).encode() + b"\n"
        )

    def debug(self, text: str, *values: object) -> None:
        self._log("debug", text, values)

    def info(self, text: str, *values: object) -> None:
        self._log("info", text, values)

    def warning(self, text: str, *values: object) -> None:
        self._log("warning", text, values)

    def error(self, text: str, *values: object) -> None:
        self._log("error", text, values)

    def _log(self, level: str, text: str, values: tuple[object, ...]) -> None:
        if LEVELS.index(level) >= self._least:
            line = self._write(level, text % values if values else text)
            output.stderr.say(line.encode(errors="replace") + b"\n")


def error_lines(messages: Sequence[str]) -> list[str]:
    """Lines as JSON, without newlines, for an error that ends a process."""
    return [_json("error", message) for message in messages]


def _text(level: str, message: str) -> str:
    """[2026-01-01 00:00:00 +0000] [pid] [INFO] message"""
    at = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"[{at}] [{os.getpid()}] [{level.upper()}] {message}"


def _json(level: str, message: str) -> str:
    fields = {
        "time": round(time.time(), 3),
        "pid": os.getpid(),
        "level": level,
        "message": message,
    }
    return msgspec.json.encode(fields).decode()
