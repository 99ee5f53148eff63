"""When `steer attach` looks for listeners, and its end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from steer.attach import service
from steer.errors import KernelError
from steer.linux import signals
from steer.linux.log import Log


def test_who_asks_is_told_that_the_detach_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise KernelError("detach the group's program", "EPERM")

    async def stopped() -> None:
        attached = service._AttachedService(group, claim, {}, Log("error", "text"))
        attached._end()
        await attached._stop()

    monkeypatch.setattr(signals, "hold_signals", lambda: None)
    group: Any = SimpleNamespace(detach=refuse, plan=SimpleNamespace(name="web"))
    claim: Any = SimpleNamespace()
    with pytest.raises(KernelError, match=r"^detach web: .*EPERM; once the attacher has ended"):
        asyncio.run(stopped())


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
    group: Any = SimpleNamespace(look=look, roster=roster, joining=joining)
    claim: Any = SimpleNamespace()
    attached = service._AttachedService(group, claim, {}, Log("error", "text"))
    attached._loop = SimpleNamespace(call_later=call_later)  # type: ignore[assignment]
    monkeypatch.setattr(service.time, "monotonic", lambda: now_s[0])
    attached._look()
    now_s[0] += 4.0
    attached._heard()
    now_s[0] += 100.0
    attached._heard()
    assert pauses == [6.0, 2.0, 0.0]
