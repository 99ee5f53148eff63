"""Sections as pictures, SVG by matplotlib: a dot for each figure, a point for each request."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.figures import Figure, Section, Timeline

_OURS, _THEIRS, _FAILED, _MARK = "#0b6e4f", "#5b6470", "#c1121f", "#b8bec6"
_WIDTH_IN, _ROW_IN, _PANEL_IN = 9.0, 0.32, 1.3
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


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(picture: Any, path: Path) -> Path:
    picture.savefig(path, dpi=150, metadata={"Date": None})
    return path
