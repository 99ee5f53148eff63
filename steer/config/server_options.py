"""Options of the server that serves an app, as they are given: NAME=VALUE. Pure.

Only the server, which is imported in the workers, knows its options; `steer.child.servers.options`
reads the values by what it says of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from steer.errors import ConfigError
from steer.values import shown


def from_table(table: Mapping[str, object], source: str) -> list[str]:
    """The options of a table, as NAME=VALUE: strings as they are, all else as in JSON.

    Args:
        source: where the table came from.

    Raises:
        ConfigError: JSON cannot express a value.
    """
    return [f"{name}={_as_text(name, value, source)}" for name, value in table.items()]


def _as_text(name: str, value: object, source: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value, enc_hook=str).decode()
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
        act = f"{source}: server_options.{shown(name).strip(_QUOTE)} = {shown(value)}"
        raise ConfigError(act, "JSON cannot express it", "give a string") from None


_QUOTE = "'"
