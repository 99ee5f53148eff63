"""Draws tables as lines for a terminal. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from steer.cli.fit import fit
from steer.cli.tables import GAP, Table

_BOLD = "1"
_STYLES = {
    **dict.fromkeys(("ready", "spare", "ok"), "32"),
    **dict.fromkeys(("starting", "draining", "backoff", "warn", "unknown"), "33"),
    **dict.fromkeys(("hung", "fail"), "1;31"),
    "stopping": "2",
}
"""The style of each state and verdict, as parameters of SGR (console_codes(4))."""
_COLOURS = "3"
"""The first digit of the SGR parameters that set a colour."""


class Styles:
    """The styles that a terminal can show and the user wants.

    Args:
        has_any: whether the terminal can show styles.
        in_colour: whether to use colours.
    """

    def __init__(self, has_any: bool = True, in_colour: bool = True) -> None:
        self._has_any = has_any
        self._in_colour = in_colour

    def of(self, verdict: str) -> str:
        return self._wanted(_STYLES.get(verdict, ""))

    def of_heads(self) -> str:
        return self._wanted(_BOLD)

    def _wanted(self, style: str) -> str:
        if self._in_colour or not style:
            return style if self._has_any else ""
        return ";".join(each for each in style.split(";") if not each.startswith(_COLOURS))


def draw(tables: Sequence[Table], width: int, styles: Styles) -> list[str]:
    """The tables as lines, with an empty line between two tables. No line is longer than `width`,
    if that is possible."""
    lines: list[str] = []
    for number, table in enumerate(tables):
        lines += [""] * bool(number)
        lines += _drawn(fit(table, width), width, styles)
    return lines


def _drawn(table: Table, width: int, styles: Styles) -> Iterator[str]:
    rows = [[*map(_printable, row)] for row in (table.columns, *table.rows)]
    widths = _narrowed(
        [max(map(len, column)) for column in zip(*rows, strict=True)],
        width - len(GAP) * (len(table.columns) - 1),
    )
    verdicts = table.columns.index(table.verdicts) if table.verdicts in table.columns else None
    if table.title:
        yield from map(_printable, table.title.split("\n"))
    for number, row in enumerate(rows):
        of_cells = [styles.of(cell) if at == verdicts else "" for at, cell in enumerate(row)]
        yield from _row(row, widths, of_cells if number else [styles.of_heads()] * len(row))
    for line in table.below:
        yield from _broken(_printable(line), width)


def _row(row: Sequence[str], widths: Sequence[int], of_cells: Sequence[str]) -> Iterator[str]:
    cells = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
    for parts in zip_longest(*cells, fillvalue=""):
        padded = (
            _styled(part, style) + " " * (width - len(part))
            for part, style, width in zip(parts, of_cells, widths, strict=True)
        )
        yield GAP.join(padded).rstrip()


def _styled(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text


def _broken(text: str, width: int) -> Sequence[str]:
    """The text as lines: broken between words, and within a word that is longer than a line."""
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _narrowed(widths: Sequence[int], room: int) -> Sequence[int]:
    """The widths of the columns, reduced to fit into `room`: the widest columns first."""
    most = max(widths)
    while most > 1 and sum(min(width, most) for width in widths) > room:
        most -= 1
    narrowed = [min(width, most) for width in widths]
    for at, width in enumerate(widths):
        if width > narrowed[at] and sum(narrowed) < room:
            narrowed[at] += 1
    return narrowed


def _printable(text: str) -> str:
    """The text with a space for each character that could control the terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else " " for each in text)
