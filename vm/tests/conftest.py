"""The fixtures of `tests/`, for tests that need the machine to be a VM of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from conftest import (  # noqa: F401
    environment,
    home,
    netns,
    pytest_runtest_setup,
    service,
)

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
