"""When an attached group is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from steer.attach import looking
from steer.config import address
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare


def test_looks_that_take_long_are_followed_by_a_longer_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, pauses = [100.0], []

    def look() -> None:
        now_s[0] += 2.0

    def call_later(pause_s: float, _do: object) -> Any:
        pauses.append(pause_s)
        return SimpleNamespace(cancel=lambda: None)

    events = SimpleNamespace(skip=lambda: None)
    joining = SimpleNamespace(
        watch=SimpleNamespace(events=events),
        has_new_room=False,
        refusals=SimpleNamespace(next_s=None),
    )
    roster = SimpleNamespace(starting=[])
    bind = address.parse("127.0.0.1:80")
    group: Any = SimpleNamespace(bind=bind, look=look, roster=roster, joining=joining)
    loop: Any = SimpleNamespace(call_later=call_later)
    found = looking.Looking(loop, group, Retry(Log("error", "text"), Spare(0)))
    monkeypatch.setattr(looking.time, "monotonic", lambda: now_s[0])
    found._look()
    now_s[0] += 4.0
    found._heard()
    now_s[0] += 100.0
    found._heard()
    assert pauses == [6.0, 2.0, 0.0]
