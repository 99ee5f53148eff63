"""Counts, limits and closes the descriptors of this process."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterable

from steer.errors import ConfigError


def keep_only(fds: Iterable[int]) -> None:
    """Close every descriptor except these and 0, 1, 2."""
    kept = sorted(fd for fd in fds if fd >= 3)
    low = 3
    for fd in kept:
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    # There may be higher ones from before the limit was lowered.
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):  # the descriptor of the directory itself
                os.close(fd)


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1  # without that of the directory


def allow_descriptors(needed: int) -> tuple[int, int]:
    """Raise the soft limit on open files to `needed`, if it is lower.

    Returns:
        The former limits, for `limit_descriptors`.

    Raises:
        ConfigError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"open {needed} files, as so many workers and addresses need",
                f"the limit is {hard}",
                "raise it (ulimit -Hn, LimitNOFILE=), or use fewer workers or addresses",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return soft, hard


def limit_descriptors(limits: tuple[int, int], needed: int = 0) -> None:
    """Set the limits that the controller was started with, in a worker. Programs that use select(2)
    fail with a higher one.

    Args:
        needed: the soft limit is at least this.
    """
    soft, hard = limits
    if soft != resource.RLIM_INFINITY:
        soft = max(soft, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
