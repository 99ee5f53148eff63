"""What a bench finds: figures with their spread, and how they are shown. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from steer.cli.tables import Table

Key = TypeVar("Key")
Value = TypeVar("Value")
COLUMNS = ("figure", "median", "middle half", "min", "max", "unit", "target", "")


@dataclass(frozen=True)
class Figure:
    """Something measured, more than once where it can vary.

    Args:
        name: what, in words.
        unit: "ns", "ms"; "×" for a ratio.
        values: in the order they were taken; not empty.
        at_most: the median ought not to be above; None where nothing is asked.
        at_least: the median ought not to be below.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these lies the middle half of the values."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def reached(self) -> bool | None:
        """Whether the median is where it ought to be; None where nothing is asked."""
        if self.at_most is None and self.at_least is None:
            return None
        high_enough = self.at_least is None or self.median >= self.at_least
        return high_enough and (self.at_most is None or self.median <= self.at_most)

    def describe(self) -> dict[str, Any]:
        """For --json."""
        low, high = self.quartiles
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "quartiles": [low, high],
            "min": min(self.values),
            "max": max(self.values),
            "values": self.values,
            "at_most": self.at_most,
            "at_least": self.at_least,
            "reached": self.reached,
        }


@dataclass(frozen=True)
class Timeline:
    """What befell each request of one server, for a plot.

    Args:
        name: the server.
        points: of each that was answered: when, in seconds, and after how many ms.
        failed_s: when the others failed.
        marks_s: when something was done to the server.
    """

    name: str
    points: Sequence[tuple[float, float]]
    failed_s: Sequence[float]
    marks_s: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """How long the requests of one server took, for a plot of all of them.

    Args:
        name: the server.
        took_ms: of each, the quickest first; not empty.
    """

    name: str
    took_ms: Sequence[float]
    is_steer: bool = False

    def at_ms(self, percentile: float) -> float:
        """So many percent took no longer."""
        return self.took_ms[min(int(percentile / 100 * len(self.took_ms)), len(self.took_ms) - 1)]


@dataclass(frozen=True)
class Growth:
    """Something measured of one server at several sizes, for a plot over these, and a row.

    Args:
        name: the server.
        values: by size, in the order they were taken; not empty.
        more_than: the sizes at which it was given up, so that what it takes is more.
    """

    name: str
    values: Mapping[int, Sequence[float]]
    more_than: frozenset[int] = frozenset()
    is_steer: bool = False


@dataclass(frozen=True)
class Section:
    """Figures that belong together.

    Args:
        failures: what could not be measured, and why.
        timelines, curves: for plots beside that of the figures.
        growths: for one in its place; all of one quantity, in `unit`.
    """

    title: str
    figures: Sequence[Figure]
    failures: Sequence[str] = ()
    timelines: Sequence[Timeline] = ()
    curves: Sequence[Curve] = ()
    growths: Sequence[Growth] = ()
    unit: str = ""

    def table(self) -> Table:
        return Table(self.title, COLUMNS, [_row(figure) for figure in self.figures])


def ratio(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    at_most: float | None = None,
    at_least: float | None = None,
) -> Figure:
    """Ours to theirs, round by round: what slows a whole round is then in both."""
    pairs = zip(ours, theirs, strict=True)
    return Figure(name, "×", tuple(a / b for a, b in pairs), at_most, at_least)


def above(
    name: str,
    unit: str,
    values: Sequence[float],
    base: Sequence[float],
    at_most: float | None = None,
) -> Figure:
    """The difference, round by round."""
    pairs = zip(values, base, strict=True)
    return Figure(name, unit, tuple(a - b for a, b in pairs), at_most)


def interleaved(
    subjects: Mapping[Key, Callable[[], Value]], rounds: int
) -> dict[Key, tuple[Value, ...]]:
    """Measure every subject once a round, so that a busy minute falls on all of them.

    Every other round goes backwards: nobody always follows the same one. A round
    before the first warms caches and is not counted.
    """
    names = list(subjects)
    values: dict[Key, list[Value]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            values[name].append(subjects[name]())
    return {name: tuple(found[1:]) for name, found in values.items()}


def numbered(measure: Callable[[int], Value]) -> Callable[[], Value]:
    """A subject that is told which turn it is, from 0, the round that is not counted."""
    turns = itertools.count()
    return lambda: measure(next(turns))


def _row(figure: Figure) -> tuple[str, ...]:
    low, high = figure.quartiles
    varies = len(figure.values) > 1
    return (
        figure.name,
        number(figure.median),
        f"{number(low)} – {number(high)}" if varies else "",
        number(min(figure.values)) if varies else "",
        number(max(figure.values)) if varies else "",
        figure.unit,
        wanted(figure),
        {None: "", True: "yes", False: "no"}[figure.reached],
    )


def wanted(figure: Figure) -> str:
    limits = (("≤", figure.at_most), ("≥", figure.at_least))
    return ", ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)


def number(value: float) -> str:
    """A count as it is; else three digits that count, and never an exponent."""
    if isinstance(value, int):
        return str(value)
    size = abs(value)
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"
