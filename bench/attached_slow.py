"""Who waits behind whom: requests of which some are slow, of servers alone and attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from bench import attached, load, outcome
from bench.attached import (
    GRANIAN,
    GUNICORN,
    GZIP_S,
    NGINX,
    NODE_CLUSTER,
    NODE_THREADS,
    THREADS,
    Kind,
)
from bench.figures import Figure, Section, interleaved, ratio
from bench.load import Plan, Request

_SLEEP_S = 0.08


@dataclass(frozen=True)
class Case:
    """What one server is asked.

    Args:
        about: the slow requests, in words.
        mix: of `load.Plan`.
        rate: requests a second.
        at_most: by percentile, the most that attached may take of what it takes alone.
        fast_only: the percentiles are of the requests that are not slow.
    """

    kind: Kind
    about: str
    mix: tuple[tuple[float, float], ...]
    rate: float
    at_most: Mapping[str, float]
    fast_only: bool = False


_SLEEPS = Case(
    GUNICORN,
    "5 % of requests keep a worker for 80 ms",
    ((0.05, _SLEEP_S), (0.95, 0.002)),
    200.0,
    {"p99": 0.55},
)
CASES = (
    Case(
        NGINX,
        "0.7 % of requests are for a text that takes 0.2 s to compress; those that are not",
        ((0.007, GZIP_S), (0.993, 0.0)),
        500.0,
        {"p90": 0.05},
        fast_only=True,
    ),
    _SLEEPS,
    *(replace(_SLEEPS, kind=kind, at_most={}) for kind in (GRANIAN, THREADS)),
    *(
        # These compute instead of sleeping, and there are two CPUs.
        replace(_SLEEPS, kind=kind, rate=100.0, at_most={})
        for kind in (NODE_CLUSTER, NODE_THREADS)
    ),
)
_Found = Mapping[str, Sequence[Sequence[Request]]]
"""By "alone" and "attached", the requests of each round."""
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def sections(
    cases: Sequence[Case], port: int, environment: Mapping[str, str], seconds: float, rounds: int
) -> Iterator[Section]:
    for case in cases:
        plan = Plan(port, rate=case.rate, seed=1, at_most=int(case.rate * seconds), mix=case.mix)
        subjects = {
            "alone": partial(_alone, case.kind, plan, environment),
            "attached": partial(_attached, case.kind, plan, environment),
        }
        found = interleaved(subjects, rounds)
        title = f"{case.kind.name}, least-conn: {case.about}, {case.rate:g} a second"
        yield Section(title, [*_times(case, plan, found), *_failures(found)])


def _alone(kind: Kind, plan: Plan, environment: Mapping[str, str]) -> Sequence[Request]:
    with attached.running(kind, plan.port, environment), load.load(plan) as asking:
        return asking.finish()


def _attached(kind: Kind, plan: Plan, environment: Mapping[str, str]) -> Sequence[Request]:
    with (
        attached.running(kind, plan.port, environment) as at,
        attached.attached(at, environment, "--policy", "least-conn"),
        load.load(plan) as asking,
    ):
        return asking.finish()


def _times(case: Case, plan: Plan, found: _Found) -> Iterator[Figure]:
    for name, share in _SHARES.items():
        ms = {
            who: tuple(
                outcome.percentile_ms(_fast(each, plan) if case.fast_only else each, share)
                for each in rounds
            )
            for who, rounds in found.items()
        }
        yield from (Figure(f"{name}, {who}", "ms", values) for who, values in ms.items())
        title = f"{name}, attached to alone"
        yield ratio(title, ms["attached"], ms["alone"], at_most=case.at_most.get(name))


def _fast(found: Sequence[Request], plan: Plan) -> Sequence[Request]:
    """Those that were not slow: requests begin in the order of the schedule."""
    in_order = sorted(found, key=lambda each: each.begun_s)
    due = load.schedule(plan)
    return [each for each, asked in zip(in_order, due, strict=True) if not asked.takes_s]


def _failures(found: _Found) -> Iterator[Figure]:
    for who, rounds in found.items():
        yield outcome.failed(who, [each for requests in rounds for each in requests], 0)
