"""A hung worker that goes on: it is seen to, whenever it is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from steer.health import hangs
from steer.health.hangs import Hangs
from steer.linux.waiting import Seen


def test_one_that_acted_before_it_waits_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have got all that waited for it, so it does nothing more."""
    looks = iter([(False, Seen.YES), (True, Seen.NO), (False, Seen.YES)])
    acted, seen = zip(*looks, strict=True)
    service = SimpleNamespace(watchdog=None)
    worker: Any = SimpleNamespace(
        has_acted=iter(acted).__next__,
        acted_since_hung=False,
        is_hung=True,
        heartbeat_s=0.0,
        service=service,
    )
    waiting = iter(seen[1:])  # not asked of one that has not acted
    monkeypatch.setattr(hangs, "waits", lambda _: next(waiting))
    monkeypatch.setattr(hangs, "is_stopped", lambda _: False)
    made = Hangs.__new__(Hangs)
    pool: Any = SimpleNamespace(clock=SimpleNamespace(now_s=lambda: 0.0))
    made._pool = pool
    process: Any = SimpleNamespace(pid=1)
    assert [made._is_back(worker, process) for _ in acted] == [False, False, True]
