"""Sections as pictures, SVG by matplotlib: a dot for each figure, a point for each request, or a
line through all requests of one server, by percentile."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.figures import Curve, Figure, Section, Timeline

_OURS, _THEIRS, _FAILED, _MARK = "#0b6e4f", "#5b6470", "#c1121f", "#b8bec6"
_WIDTH_IN, _ROW_IN, _PANEL_IN = 9.0, 0.32, 1.3
_CURVES_IN = 4.5
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

    # the salt makes the same picture the same file
    matplotlib.rcParams.update({"svg.hashsalt": "steer", "font.size": 9})
    directory.mkdir(parents=True, exist_ok=True)
    for bench, sections in found.items():
        for number, section in enumerate(sections, 1):
            stem = directory / f"{bench}-{number}"
            if section.figures:
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


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(picture: Any, path: Path) -> Path:
    picture.savefig(path, dpi=150, metadata={"Date": None})
    return path
