"""The fixtures of `tests/`, for tests that need the machine to be a VM of ours."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from conftest import (  # noqa: F401
    environment,
    home,
    netns,
    pytest_runtest_setup,
    service,
)
