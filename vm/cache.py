"""What is fetched or made once: under ~/.cache/steer/vm, moved there only when whole."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def directory(kind: str = "") -> Path:
    """Made if it is not there. Args: kind: what is in it."""
    top = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made = top / "steer" / "vm" / kind
    made.mkdir(parents=True, exist_ok=True)
    return made


@contextmanager
def alone() -> Iterator[None]:
    """One at a time makes or fetches; others wait, and then find what was made."""
    with open(directory() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def making() -> Iterator[Path]:
    """A scratch directory in the same file system, gone at the end."""
    with tempfile.TemporaryDirectory(dir=directory(), prefix="making-") as name:
        yield Path(name)


def keep(made: Path, kind: str) -> Path:
    """From the scratch directory to where it stays."""
    return made.rename(directory(kind) / made.name)


def say(words: str) -> None:
    print(f"vm: {words}", file=sys.stderr, flush=True)
