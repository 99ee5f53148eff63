"""Sections as pictures, SVG by matplotlib: a dot for each figure, a point for each request, a line
through all requests of one server, by percentile, or one for each server, over its sizes."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Curve, Figure, Growth, Section, Timeline

_OURS, _THEIRS, _FAILED, _MARK = "#0b6e4f", "#5b6470", "#c1121f", "#b8bec6"
_WIDTH_IN, _ROW_IN, _PANEL_IN = 9.0, 0.32, 1.3
_CURVES_IN = 4.5
_GROWTH_IN = (5.5, 3.6)
_GRID_IN, _GRID_COLUMNS = (3.1, 2.3), 3
_CURVE_POINTS = 200
_PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_COLOURS = ("#0b6e4f", "#2a6fbb", "#7a4fb5", "#c9a227", "#e07a1f", "#c1121f")
_DASHES = ("--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)))
_POINTS_MAX = 20_000
"""Of one timeline; of more, one in so many is drawn, and always every failure."""


def is_possible() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(found: Mapping[str, Iterable[Section]], directory: Path) -> Iterator[Path]:
    """Write what there is to see into files, named by bench and number; says which."""
    import matplotlib

    # The salt makes the same picture the same file. Text stays text, as outlines are larger.
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "steer",
            "svg.fonttype": "none",
            "font.size": 9,
            "font.sans-serif": ["DejaVu Sans"],
        }
    )
    directory.mkdir(parents=True, exist_ok=True)
    for bench, each in found.items():
        sections = list(each)
        if growing := [section for section in sections if section.growths]:
            yield _save(_grid(growing), directory / f"{bench}.svg")
        for number, section in enumerate(sections, 1):
            stem = directory / f"{bench}-{number}"
            if section.growths:
                yield _save(_growth(section), stem.with_suffix(".svg"))
            elif section.figures:
                yield _save(_dots(section), stem.with_suffix(".svg"))
            if section.timelines:
                yield _save(_timelines(section), stem.with_name(f"{stem.name}-timeline.svg"))
            if section.curves:
                yield _save(_curves(section), stem.with_name(f"{stem.name}-percentiles.svg"))


def _dots(section: Section) -> Any:
    """Those in the first figure's unit; others would need an axis of their own."""
    from matplotlib.figure import Figure as Picture

    unit = section.figures[0].unit
    rows = [figure for figure in section.figures if figure.unit == unit][::-1]
    picture = Picture(figsize=(_WIDTH_IN, 1.0 + _ROW_IN * len(rows)), layout="constrained")
    axes = picture.subplots()
    for row, figure in enumerate(rows):
        asked = figure.reached is not None
        axes.hlines(row, 0, figure.median, color=_MARK, linewidth=1)
        axes.plot(figure.median, row, "o", color=_OURS if asked else _THEIRS)
        axes.annotate(_label(figure), (figure.median, row), (7, -3), textcoords="offset points")
    axes.set_yticks(range(len(rows)), [figure.name for figure in rows])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0, right=10 * max(1, *(figure.median for figure in rows)))
    axes.set(title=section.title, xlabel=unit)
    _plain(axes)
    return picture


def _label(figure: Figure) -> str:
    return f"{figure.median:,}" if isinstance(figure.median, int) else f"{figure.median:.3g}"


def _timelines(section: Section) -> Any:
    """A panel for each, one below the other, with the same axes."""
    from matplotlib.figure import Figure as Picture

    timelines = section.timelines
    size = (_WIDTH_IN, 0.8 + _PANEL_IN * len(timelines))
    picture = Picture(figsize=size, layout="constrained")
    panels = picture.subplots(len(timelines), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, timeline in zip(panels, timelines, strict=True):
        _panel(axes, timeline)
    panels[-1].set_xlabel("seconds; a grey line where something was done, a red one for a failure")
    picture.suptitle(section.title)
    return picture


def _panel(axes: Any, timeline: Timeline) -> None:
    for mark_s in timeline.marks_s:
        axes.axvline(mark_s, color=_MARK, linewidth=0.8, zorder=0)
    points = timeline.points[:: 1 + len(timeline.points) // _POINTS_MAX]
    times_s, took_ms = [point[0] for point in points], [point[1] for point in points]
    axes.plot(times_s, took_ms, ",", color=_OURS, rasterized=True)
    top, along = [0.93] * len(timeline.failed_s), axes.get_xaxis_transform()
    axes.plot(timeline.failed_s, top, "|", color=_FAILED, transform=along)
    axes.set_title(f"{timeline.name}: {len(timeline.failed_s):,} failed", loc="left", size=9)
    axes.set(yscale="log", ylabel="ms")
    _plain(axes)


def _curves(section: Section) -> Any:
    """From the median on, with as much room for every further nine. Named from the slowest on."""
    from matplotlib.figure import Figure as Picture
    from matplotlib.ticker import NullLocator

    picture = Picture(figsize=(_WIDTH_IN, _CURVES_IN), layout="constrained")
    axes = picture.subplots()
    last = max(_PERCENTILES)
    ours, theirs = itertools.cycle(_COLOURS), itertools.cycle(_DASHES)
    for curve in sorted(section.curves, key=lambda each: each.at_ms(last)):
        line = {"color": next(ours)} if curve.is_steer else {"ls": next(theirs), "color": _THEIRS}
        _draw_curve(axes, curve, last, line)
    axes.set_xscale("log")
    axes.set_xticks([_rarity(each) for each in _PERCENTILES], [f"p{e:g}" for e in _PERCENTILES])
    axes.set_yscale("log", subs=(2, 5))
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(ylabel="ms", title=section.title.rpartition(":")[0])
    axes.grid(which="both", color=_MARK, linewidth=0.4)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    _plain(axes)
    return picture


def _draw_curve(axes: Any, curve: Curve, last: float, line: Mapping[str, Any]) -> None:
    """A line of at most so many points, evenly spaced in the picture."""
    low, high = (math.log10(_rarity(each)) for each in (50, last))
    rarities = [10 ** (low + (high - low) * n / _CURVE_POINTS) for n in range(_CURVE_POINTS + 1)]
    took_ms = [curve.at_ms(100 * (1 - 1 / rarity)) for rarity in rarities]
    axes.plot(rarities, took_ms, label=curve.name, linewidth=1.4, **line)


def _rarity(percentile: float) -> float:
    """One in so many takes longer."""
    return 100 / (100 - percentile)


def _growth(section: Section) -> Any:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=_GROWTH_IN, layout="constrained")
    axes = picture.subplots()
    _grow(axes, section)
    axes.set_xlabel("workers")
    axes.legend(frameon=False)
    return picture


def _grid(sections: Sequence[Section]) -> Any:
    """All of them in one picture, small."""
    from matplotlib.figure import Figure as Picture

    rows = math.ceil(len(sections) / _GRID_COLUMNS)
    width_in, height_in = _GRID_IN
    size = (width_in * _GRID_COLUMNS, height_in * rows + 0.4)
    picture = Picture(figsize=size, layout="constrained")
    panels = list(picture.subplots(rows, _GRID_COLUMNS, squeeze=False).flat)
    for section, axes in itertools.zip_longest(sections, panels):
        if section is None:
            axes.set_axis_off()
        else:
            _grow(axes, section)
    named = {
        label: line
        for axes in panels
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    picture.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=len(named),
        frameon=False,
    )
    return picture


def _grow(axes: Any, section: Section) -> None:
    """A band is the middle half; an arrow up, where it was given up."""
    ours, theirs = itertools.cycle(_COLOURS), itertools.cycle(_DASHES)
    for growth in section.growths:
        line = {"color": next(ours)} if growth.is_steer else {"ls": next(theirs), "color": _THEIRS}
        _draw_growth(axes, growth, line)
    sizes = sorted({size for growth in section.growths for size in growth.values})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    if all(
        value > 0 for growth in section.growths for of in growth.values.values() for value in of
    ):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0, top=max(1, axes.get_ylim()[1]))
    axes.minorticks_off()
    axes.yaxis.set(major_formatter=_plain_number)
    what = section.title.rpartition(": ")[2]
    axes.set_title(f"{what}, {section.unit}" if section.unit else what, size=9)
    axes.grid(color=_MARK, linewidth=0.4)
    _plain(axes)


def _draw_growth(axes: Any, growth: Growth, line: Mapping[str, Any]) -> None:
    figures = [Figure("", "", tuple(values)) for _, values in sorted(growth.values.items())]
    sizes, medians = sorted(growth.values), [figure.median for figure in figures]
    axes.plot(sizes, medians, label=growth.name, linewidth=1.4, marker=".", **line)
    low, high = zip(*(figure.quartiles for figure in figures), strict=True)
    axes.fill_between(sizes, low, high, color=line["color"], alpha=0.15, linewidth=0)
    for size, median in zip(sizes, medians, strict=True):
        if size in growth.more_than:
            axes.plot(size, median, "^", color=line["color"])


def _plain_number(value: float, _position: int) -> str:
    return f"{value:,g}"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(picture: Any, path: Path) -> Path:
    picture.savefig(path, dpi=150, metadata={"Date": None})
    return path
