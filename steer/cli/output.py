"""Prints tables: fitted to a terminal, or as plain text. Shows progress on a terminal."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import TYPE_CHECKING, NoReturn

import msgspec

from steer.cli.tables import Table, plain

if TYPE_CHECKING:
    from steer.control.client import Progress

WATCH_S = 1.0
_TURN_S = 0.13
_COLUMNS, _LINES = 80, 24
"""The assumed size of a terminal that does not report its size."""

# See console_codes(4); for the alternate screen, xterm's control sequences.
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_OTHER_SCREEN, _FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
_CUT_LINES, _WRAP_LINES = "\x1b[?7l", "\x1b[?7h"
_HOME, _ERASE_REST, _ERASE_BELOW, _ERASE_LINE = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2K"


def tables(found: Sequence[Table]) -> None:
    if sys.stdout.isatty():
        for line in _drawn(found):
            print(line)
        return
    print("\n\n".join(plain(table) for table in found), end="\n" if found else "")


def as_json(found: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


def watch(look: Callable[[], Sequence[Table]]) -> NoReturn:
    """Call `look` every second and print its tables, until interrupted.

    A terminal shows them in place, on its alternate screen, where lines that do not fit do not
    scroll. Other outputs get the tables one after the other.
    """
    if not sys.stdout.isatty():
        again(lambda: tables(look()))
    sys.stdout.write(_OTHER_SCREEN + _HIDE_CURSOR + _CUT_LINES)
    try:
        while True:
            shown = _drawn(look())[: _size()[1]]
            lines = f"{_ERASE_REST}\n".join(shown)
            sys.stdout.write(_HOME + lines + _ERASE_REST + _ERASE_BELOW)
            sys.stdout.flush()
            time.sleep(WATCH_S)
    finally:
        sys.stdout.write(_WRAP_LINES + _SHOW_CURSOR + _FIRST_SCREEN)
        sys.stdout.flush()


def again(act: Callable[[], None]) -> NoReturn:
    """Call `act` every second, until interrupted."""
    while True:
        act()
        sys.stdout.flush()
        time.sleep(WATCH_S)


@contextmanager
def progress(words: str) -> Iterator[Progress | None]:
    """Show a line of progress on the terminal until the block ends; None without a terminal.

    Args:
        words: the text until the first report of progress.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from threading import Event

    from steer.linux import threads

    line, is_over = _Line(words), Event()

    def turn() -> None:
        while not is_over.wait(_TURN_S):
            line.draw()

    turning = threads.start(turn)
    sys.stderr.write(_HIDE_CURSOR)
    line.draw()
    try:
        yield line.say
    finally:
        is_over.set()
        turning.join()
        sys.stderr.write(f"{_SHOW_CURSOR}\r{_ERASE_LINE}")
        sys.stderr.flush()


class _Line:
    """A line of progress: a spinner and the latest text."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._turns = cycle("-\\|/")

    def say(self, text: str, done: int, of: int) -> None:
        self._words = f"{text} {done}/{of}" if of else text
        self.draw()

    def draw(self) -> None:
        shown = f"{next(self._turns)} {self._words}"[: _size()[0] - 1]
        sys.stderr.write(f"\r{shown}{_ERASE_REST}")
        sys.stderr.flush()


def _drawn(found: Sequence[Table]) -> list[str]:
    from steer.cli.drawing import Styles, draw

    has_styles = os.environ.get("TERM") not in ("dumb", "unknown")
    return draw(found, _size()[0], Styles(has_styles, not os.environ.get("NO_COLOR")))


def _size() -> tuple[int, int]:
    """Columns and lines: of the environment if it has them, else of the terminal."""
    columns, lines = 0, 0
    for stream in (sys.stderr, sys.stdout):
        with suppress(OSError, ValueError):
            columns, lines = os.get_terminal_size(stream.fileno())
    return _given("COLUMNS") or columns or _COLUMNS, _given("LINES") or lines or _LINES


def _given(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if _SIZE.fullmatch(text) else 0


_SIZE = re.compile(r"[1-9][0-9]{0,3}")
