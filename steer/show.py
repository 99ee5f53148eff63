"""Tables on standard output: with rich where there is a terminal, plain text where not.
And on standard error, if that is a terminal, how far something is."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import msgspec

from steer import report
from steer.fit import fit
from steer.report import Table

if TYPE_CHECKING:
    from rich.console import Console, Group

    from steer.client import Progress

WATCH_S = 1.0


def tables(found: Sequence[Table]) -> None:
    if sys.stdout.isatty():
        console = _console()
        console.print(_rich(found, console.width))
        return
    print("\n\n".join(report.plain(table) for table in found), end="\n" if found else "")


def as_json(found: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


def watch(look: Callable[[], Sequence[Table]]) -> NoReturn:
    """Print what `look` sees again and again, until interrupted: in place, on a screen of its
    own, as what is longer than the terminal would scroll; where there is no terminal, one after
    the other."""
    if not sys.stdout.isatty():
        again(lambda: tables(look()))
    from rich.live import Live

    console = _console()
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(_rich(look(), console.width), refresh=True)
            time.sleep(WATCH_S)


def again(tell: Callable[[], None]) -> NoReturn:
    """Once a second, until interrupted."""
    while True:
        tell()
        sys.stdout.flush()
        time.sleep(WATCH_S)


@contextmanager
def progress(words: str) -> Iterator[Progress | None]:
    """While it lasts, a line that says how far it is; None where there is no terminal.

    Args:
        words: what is said until there is more to say.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    with Status(Text(words), console=Console(stderr=True), spinner="line") as line:
        yield lambda text, done, of: line.update(Text(f"{text} {done}/{of}" if of else text))


_STYLES = {
    **dict.fromkeys(("ready", "ok"), "green"),
    **dict.fromkeys(("starting", "draining", "backoff", "warn", "unknown"), "yellow"),
    **dict.fromkeys(("hung", "fail"), "bold red"),
    "stopping": "dim",
}
"""Of what says how something is."""


def _console() -> Console:
    """Of standard output. rich leaves out colour where NO_COLOR is set, but takes whatever
    isdigit() for a number of columns."""
    from rich.console import Console

    for name in ("COLUMNS", "LINES"):
        if not _SIZE.fullmatch(os.environ.get(name, "")):
            os.environ.pop(name, None)
    return Console(highlight=False)


_SIZE = re.compile(r"[1-9][0-9]{0,3}")


def _rich(found: Sequence[Table], width: int) -> Group:
    from rich import table
    from rich.console import Group
    from rich.text import Text

    drawn: list[table.Table | Text] = []
    for number, each in enumerate(fit(one, width) for one in found):
        grid = table.Table(
            box=None,
            padding=(0, 2, 0, 0),
            pad_edge=False,
            header_style="bold",
            collapse_padding=True,
        )
        for column in each.columns:
            # Where not even these columns fit, values break rather than being cut off.
            whole = not each.is_prose and report.plain_width(each) <= width
            grid.add_column(column, no_wrap=whole, overflow="fold")
        at = each.columns.index(each.verdicts) if each.verdicts in each.columns else -1
        for row in each.rows:
            grid.add_row(
                *(
                    Text(cell, _STYLES.get(cell, "") if place == at else "")
                    for place, cell in enumerate(row)
                )
            )
        if number:
            drawn.append(Text())
        drawn += [*([Text(each.title)] if each.title else []), grid, *map(Text, each.below)]
    return Group(*drawn)
