"""How many requests a second, a connection each, when there are more than can be answered.

wrk asks, which takes least of what CPU there is. The same uvicorn application under steer and under
uvicorn's own `--workers`; a worker for each CPU.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from functools import partial

from bench import peers, wrk
from bench.figures import Figure, Section, interleaved, ratio
from bench.peers import Running, carrying_uvicorn, plain, under_steer, uvicorn
from steer.errors import SteerError

OURS, SERVED, THEIRS = "least-conn", "least-conn, --server uvicorn", "uvicorn --workers"
CONCURRENCY = 32
AT_LEAST = 1.0
_APP = "bench.apps:asgi"
_PORT = 9890


def section(quick: bool) -> Section:
    rounds, for_s = (1, 0.5) if quick else (15, 3.0)
    workers = len(os.sched_getaffinity(0))
    policies = (OURS,) if quick else (OURS, "round-robin", "kernel")
    carried = carrying_uvicorn(_APP)
    ours = [under_steer(name, workers, "--policy", name, *carried) for name in policies]
    served = ("--policy", OURS, *peers.served_by_uvicorn(_APP))
    ours.append(under_steer(SERVED, workers, *served))
    theirs = plain(THEIRS, uvicorn(workers, _APP))
    failures: list[str] = []
    with ExitStack() as stack:
        running = peers.all_running([*ours, theirs], _PORT, workers, stack, failures)
        subjects = {name: partial(_per_second, one, for_s) for name, one in running.items()}
        found = interleaved(subjects, rounds)
    ratios = [
        ratio(f"{name} to {THEIRS}", values, found[THEIRS], at_least=wish)
        for name, values in found.items()
        for wish in (AT_LEAST if name in (OURS, SERVED) else None,)
        if name != THEIRS and THEIRS in found
    ]
    rates = [Figure(name, "/s", values) for name, values in found.items()]
    title = f"requests a second, c={CONCURRENCY}, {workers} workers, a connection each, uvicorn"
    return Section(title, [*ratios, *rates], failures)


def _per_second(running: Running, for_s: float) -> float:
    """Raises SteerError: a request failed."""
    with wrk.asking(running.site.port, CONCURRENCY) as client:
        time.sleep(for_s)
        counts = client.finish()
    if counts.errors:
        raise SteerError(f"ask {running.peer.name}", f"{counts.errors:,} requests failed")
    return counts.per_second
