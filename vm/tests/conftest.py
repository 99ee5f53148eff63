"""The fixtures of `tests/`, for tests that need the machine to be a VM of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit.capabilities import require
from testkit.fixtures import environment, home, netns, service, steer  # noqa: F401

GUEST_ONLY = Path("/host/tree.tar")
"""What vm/guest/enter unpacks."""


def pytest_configure() -> None:
    """Network cards are taken from whoever uses them: over one, somebody may be logged in."""
    if not GUEST_ONLY.exists():
        pytest.exit(
            "run vm/tests: they rewire the network cards of the machine they run on, and this one "
            f"is not the guest of ./dev vm: it has no {GUEST_ONLY}; say: ./dev vm test vm/tests",
            pytest.ExitCode.USAGE_ERROR,
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        require(*mark.args)
