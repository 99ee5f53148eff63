"""From requests to figures and timelines. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.figures import Figure, Timeline
from bench.load import OK, Request


def failures(requests: Sequence[Request]) -> Counter[str]:
    """How many failed, by outcome."""
    return Counter(request.outcome for request in requests if request.outcome != OK)


def failed(name: str, requests: Sequence[Request], at_most: float | None) -> Figure:
    """How many failed; of how many, and how, is in the figure's name."""
    kinds = failures(requests)
    how = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    name = f"{name}, of {len(requests):,}" + (f": {how}" if how else "")
    return Figure(name, "failed", (kinds.total(),), at_most)


def over(requests: Sequence[Request], limit_s: float) -> int:
    """How many took longer, whatever came in the end: an answer or not."""
    return sum(request.took_s > limit_s for request in requests)


def percentile_ms(requests: Sequence[Request], share: float) -> float:
    """So long at most took this share of them, answered or not."""
    took = sorted(request.took_s for request in requests)
    return 1000 * took[min(int(share * len(took)), len(took) - 1)]


def timeline(name: str, requests: Sequence[Request], marks_s: Sequence[float]) -> Timeline:
    """Args: marks_s: when something was done, by the requests' clock."""
    from_s = min((request.begun_s for request in requests), default=0.0)
    answered = [request for request in requests if request.outcome == OK]
    return Timeline(
        name,
        [(request.begun_s - from_s, 1000 * request.took_s) for request in answered],
        [request.ended_s - from_s for request in requests if request.outcome != OK],
        [mark_s - from_s for mark_s in marks_s],
    )
