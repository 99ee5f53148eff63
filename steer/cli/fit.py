"""Fits a table into a terminal: it leaves out columns before lines would break. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import msgspec

from steer.cli.tables import GAP, Table, plain_width


def fit(table: Table, width: int) -> Table:
    """The table with lines of at most `width` characters, if that is possible.

    Optional columns are left out one by one, in the order of `table.optional`: first columns with
    the same text in every row, then the others. A line below the table names them.
    """
    left_out: list[str] = []
    fitted = table
    candidates = sorted(table.optional, key=lambda name: not _is_uniform(table, name))
    while plain_width(fitted) > width and candidates:
        left_out.append(candidates.pop(0))
        fitted = _without(fitted, left_out[-1])
    note = _lines(f"no room for: {', '.join(left_out)}", width) if left_out else ()
    below = [*table.below, *note]
    title = "\n".join(line for part in table.title.split("\n") for line in _lines(part, width))
    return msgspec.structs.replace(fitted, title=title, below=below)


def _is_uniform(table: Table, name: str) -> bool:
    """Whether the column has the same text in every row."""
    at = table.columns.index(name)
    return len({row[at] for row in table.rows}) <= 1


def _without(table: Table, name: str) -> Table:
    at = table.columns.index(name)
    rows = [[*row[:at], *row[at + 1 :]] for row in table.rows]
    columns = [*table.columns[:at], *table.columns[at + 1 :]]
    return msgspec.structs.replace(table, columns=columns, rows=rows)


def _lines(text: str, width: int) -> Sequence[str]:
    """The text as lines: broken at gaps if that is enough, else between words."""
    lines: list[str] = []
    for part in text.split(GAP):
        if lines and len(lines[-1]) + len(GAP) + len(part) <= width:
            lines[-1] += GAP + part
        else:
            lines += textwrap.wrap(part, width, subsequent_indent="  ") or [""]
    return lines
