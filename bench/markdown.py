"""Sections as tables in Markdown, to be pasted into docs/BENCH.md. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.figures import Figure, Growth, Section, number, wanted


def text(sections: Sequence[Section]) -> str:
    """What grows in one table, and after it the figures of which something is wished; of other
    sections a table each."""
    growing = [section for section in sections if section.growths]
    tables = [*_growth(growing), *(_figures(section) for section in sections)]
    return "\n".join(table for table in tables if table)


def _growth(sections: Sequence[Section]) -> Iterator[str]:
    growths = [growth for section in sections for growth in section.growths]
    sizes = sorted({size for growth in growths for size in growth.values})
    if sizes:
        rows = [_row(section, growth, sizes) for section in sections for growth in section.growths]
        yield _table(["", "", *(f"{size:,} workers" for size in sizes)], rows)


def _row(section: Section, growth: Growth, sizes: Sequence[int]) -> list[str]:
    """What it is of is said once, in the first of its rows."""
    what = section.title.rpartition(": ")[2]
    about = f"{what}, {section.unit}" if section.unit else what
    first = growth is section.growths[0]
    return [about if first else "", growth.name, *(_cell(growth, size) for size in sizes)]


def _cell(growth: Growth, size: int) -> str:
    if size not in growth.values:
        return ""
    figure = Figure("", "", tuple(growth.values[size]))
    more = "> " if size in growth.more_than else ""
    return f"{more}{number(figure.median)}{_spread(figure)}"


def _spread(figure: Figure) -> str:
    low, high = map(number, figure.quartiles)
    return "" if low == high else f" ({low} – {high})"


def _figures(section: Section) -> str:
    figures = [f for f in section.figures if f.reached is not None or not section.growths]
    rows = [
        [
            f"{figure.name}",
            f"{number(figure.median)}{_spread(figure)} {figure.unit}".rstrip(),
            wanted(figure),
            {None: "", True: "yes", False: "**no**"}[figure.reached],
        ]
        for figure in figures
    ]
    return _table([section.title.rpartition(": ")[2], "median (middle half)", "target", ""], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    ruler = ["---"] * len(columns)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ruler, *rows))
