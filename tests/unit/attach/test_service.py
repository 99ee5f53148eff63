"""The end of `steer attach`."""

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
        attached = service._AttachedService(group, unused, unused, {}, Log("error", "text"))
        attached._end()
        await attached._stop()

    monkeypatch.setattr(signals, "hold_signals", lambda: None)
    group: Any = SimpleNamespace(detach=refuse, plan=SimpleNamespace(name="web"))
    unused: Any = SimpleNamespace()
    with pytest.raises(KernelError, match=r"^detach web: .*EPERM; once the attacher has ended"):
        asyncio.run(stopped())
