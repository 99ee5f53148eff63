"""What the controller may do to a process like its workers."""

from __future__ import annotations

from steer.workers import access
from steer.workers.access import Access


def test_we_may_do_all_to_our_like() -> None:
    assert access.access_to(lambda: None) == Access()
