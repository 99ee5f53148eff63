"""Programs that tests run, each a file: style and types are checked in them as in all else.

Tests copy them to where a service finds them (`copy`), or run them by their paths (`path`).
"""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> str:
    """Of the program of that name, for a command line."""
    return str(Path(__file__).with_name(f"{name}.py"))


def source(name: str) -> str:
    """Its text, for a test to write down where a service looks for it."""
    return Path(path(name)).read_text()
