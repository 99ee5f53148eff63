"""Says without --strict, which `steer attach` does not have, that only eBPF can steer listeners."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from steer.errors import AttachRefused, FallbackRefused


@contextmanager
def of_fallbacks(act: str) -> Iterator[None]:
    """Raises AttachRefused: only a fallback would work."""
    try:
        yield
    except FallbackRefused as error:
        cause = f"only eBPF steers listeners of other programs, and {error.reason}"
        raise AttachRefused(act, cause) from None
