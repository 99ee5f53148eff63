"""For tests of your own: a group on a free port of the loopback. Needs no test framework.

from steer.testing import reuseport_group

with reuseport_group("round-robin", slots=2) as group, group.listen(0) as sock:
    group.activate(0)
    ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from steer.api.group import ReuseportGroup


@contextmanager
def reuseport_group(
    policy: str = "auto",
    *,
    slots: int = 2,
    protocol: str = "tcp",
    params: Mapping[str, int] | None = None,
    backend: str = "auto",
) -> Iterator[ReuseportGroup]:
    """A group at 127.0.0.1 and a free port, closed on leaving; `group.address` says which.

    Args:
        protocol: "tcp" or "udp".
        policy, slots, params, backend: as of `ReuseportGroup`.

    Raises: as `ReuseportGroup`.
    """
    address = f"{protocol}://127.0.0.1:0"
    with ReuseportGroup(
        address, policy, slots=slots, params=params or {}, backend=backend
    ) as group:
        yield group
