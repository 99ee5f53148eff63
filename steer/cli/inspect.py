"""The command `inspect`."""

from __future__ import annotations

import gc
from contextlib import nullcontext, suppress

from steer.cli import inspect_tables, output
from steer.config import quantities
from steer.errors import ConfigError
from steer.inspect import target as targets
from steer.inspect.inspection import Asked, inspect
from steer.values import Invalid, shown

_LONGEST_S = 86400.0


def perform(
    target: str | None,
    count_for: str | None,
    netns: str | None,
    as_json: bool,
    attach_options: frozenset[str],
) -> None:
    """Show who serves.

    Raises:
        ConfigError: what is asked for cannot be, or is not there.
        KernelError: nothing can be seen.
    """
    gc.disable()  # of thousands of sockets nothing is garbage until the end
    wanted = targets.parse(target)
    seconds = None if count_for is None else _seconds(count_for)
    asked = Asked(wanted, netns, seconds, attach_options)
    with output.progress(f"counting for {count_for}") if seconds else nullcontext():
        found = inspect(asked)
    if as_json:
        output.as_json(found)
    elif found.groups:
        output.tables(inspect_tables.of_inspection(found, in_full=target is not None))
    else:
        print("no socket serves here")


def _seconds(text: str) -> float:
    seconds = 0.0
    with suppress(Invalid):
        seconds = quantities.seconds(text)
    if not 0.0 < seconds <= _LONGEST_S:
        act = f"read --for {shown(text)}"
        raise ConfigError(act, "not a time of at most a day", "write 5s, 500ms or 2m")
    return seconds
