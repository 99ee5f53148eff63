"""Whether the attacher of a program that nobody seems to have open still lives."""

from __future__ import annotations

import pytest

from steer.attach import leftover
from steer.errors import AttachRefused


def has(monkeypatch: pytest.MonkeyPatch, *silent_s: float | None) -> list[float | None]:
    """Has the heartbeat be this old at each look; the looks that are still to come."""
    left = list(silent_s)
    monkeypatch.setattr(leftover.heartbeat, "silent_s", lambda _number: left.pop(0))
    monkeypatch.setattr(leftover, "_MARGIN_S", 0.0)
    monkeypatch.setattr(leftover, "ABANDONED_S", 0.01)
    return left


@pytest.mark.parametrize("silent_s", [[None], [0.02], [0.0, 0.02], [0.0, None]])
def test_one_whose_heartbeat_is_old_or_gets_old_is_abandoned(
    monkeypatch: pytest.MonkeyPatch, silent_s: list[float | None]
) -> None:
    left = has(monkeypatch, *silent_s)
    leftover.refuse_unseen(1, "attach to :80")
    assert not left


def test_one_whose_heartbeat_is_renewed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 0.0, 0.0)
    with pytest.raises(AttachRefused, match="an attacher that cannot be seen from here steers it"):
        leftover.refuse_unseen(1, "attach to :80")
