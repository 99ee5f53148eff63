"""What a reload costs requests in latency, with an application that takes long to import.

Two ways to take long: one waits and one computes. The second takes CPUs from the workers that
serve, whoever starts it, so it is a figure of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from bench import late, load, outcome, peers
from bench.figures import Figure, Section, interleaved, ratio
from bench.load import Plan
from bench.peers import Running
from steer.errors import SteerError

RATE = 300.0
"""Requests a second: well within what two CPUs can do while they import."""
SHARE = 0.999
_PORT = 9800
_SETTLE_S = 0.5
_WITHOUT, _AGAIN = "no reload", "no reload, again"
_RELOADS = {"its import waits": late.SLEEP, "its import computes": late.BUSY}


def section(import_s: float, window_s: float, rounds: int) -> Section:
    """Two services, each with its own slow import, and windows with and without a reload.

    What two windows without one differ by, in any round and either way, is the noise, and the
    limit.

    Args:
        window_s: of load.
    """
    with ExitStack() as stack:
        ours = []
        for port, variable in enumerate(_RELOADS.values(), _PORT):
            peer = peers.steered("cpu", "bench.late:asgi")
            running = peers.running(peer, port, {variable: str(import_s)})
            ours.append(stack.enter_context(running))
        subjects: dict[str, Callable[[], float]] = {
            name: partial(_window_ms, running, window_s, reload=True)
            for name, running in zip(_RELOADS, ours, strict=True)
        }
        for name in (_WITHOUT, _AGAIN):
            subjects[name] = partial(_window_ms, ours[0], window_s, reload=False)
        found = interleaved(subjects, rounds)
    noise = ratio(f"{_AGAIN} to {_WITHOUT}", found[_AGAIN], found[_WITHOUT], None)
    at_most = max(max(value, 1 / value) for value in noise.values)
    ratios = [
        ratio(f"{name} to {_WITHOUT}", found[name], found[_WITHOUT], at_most) for name in _RELOADS
    ]
    times = [Figure(name, "ms", values) for name, values in found.items()]
    title = f"reload with an import of {import_s:g} s, {RATE:g} requests/s: p99.9"
    return Section(title, [*ratios, noise, *times])


def _window_ms(running: Running, window_s: float, *, reload: bool) -> float:
    """The percentile of a while with one reload in it, or none.

    Raises:
        SteerError: a request failed.
    """
    with load.load(Plan(running.site.port, rate=RATE, seed=1)) as client:
        until_s = time.monotonic() + window_s
        time.sleep(_SETTLE_S)
        if reload:
            peers.steer(running, "reload")
        time.sleep(max(until_s - time.monotonic(), _SETTLE_S))
        requests = client.finish()
    if kinds := outcome.failures(requests):
        raise SteerError("reload with a slow import", f"failed: {dict(kinds)}")
    return outcome.percentile_ms(requests, SHARE)
