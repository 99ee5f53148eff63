"""Gives a worker random numbers of its own, as it has the generators of its template process.

Python seeds `random` after a fork (os.register_at_fork), OpenSSL notices a fork by itself, and
`secrets`, `uuid.uuid4` and `os.urandom` ask the kernel.
"""

from __future__ import annotations

import sys


def reseed() -> None:
    """Seed the global generator of numpy, if numpy was imported."""
    if (legacy := sys.modules.get("numpy.random")) is not None:
        legacy.seed()
