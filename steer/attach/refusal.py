"""Why listeners are not attached here, whatever they are: what the kernel lacks, and that only eBPF
can steer them, said without --strict, which `steer attach` does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from steer import features
from steer.errors import AttachRefused, FallbackRefused
from steer.features import Answer
from steer.loader import probe


def of_kernel(act: str) -> None:
    """Raises AttachRefused: it cannot move what waits at a listener that closes."""
    found = probe.ask(features.MIGRATE)
    if found.answer is Answer.NO and found.errno is None:
        raise AttachRefused(act, found.reason, found.cure)


@contextmanager
def of_fallbacks(act: str) -> Iterator[None]:
    """Raises AttachRefused: only a fallback would work."""
    try:
        yield
    except FallbackRefused as error:
        cause = f"only eBPF steers listeners of other programs, and {error.reason}"
        raise AttachRefused(act, cause) from None
