"""Tables on standard output: with rich where there is a terminal, plain text where not.
And on standard error, if that is a terminal, how far something is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from steer import report
from steer.report import Table

if TYPE_CHECKING:
    from rich.console import Group

    from steer.client import Progress

WATCH_S = 1.0


def tables(found: Sequence[Table]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(_rich(found))
        return
    print("\n\n".join(report.plain(table) for table in found), end="\n" if found else "")


def watch(look: Callable[[], Sequence[Table]]) -> None:
    """Print what `look` sees again and again, until interrupted; where there is no
    terminal, one after the other."""
    if not sys.stdout.isatty():
        again(lambda: tables(look()))
    from rich.live import Live

    with Live(_rich(look()), auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(_rich(look()), refresh=True)


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


def _rich(found: Sequence[Table]) -> Group:
    from rich import box, table
    from rich.console import Group
    from rich.text import Text

    drawn: list[table.Table | Text] = []
    for each in found:
        grid = table.Table(
            title=Text(each.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for column in each.columns:
            grid.add_column(column, overflow="fold")
        for row in each.rows:
            grid.add_row(*(Text(cell) for cell in row))
        drawn += [grid, *map(Text, each.below)]
    return Group(*drawn)
