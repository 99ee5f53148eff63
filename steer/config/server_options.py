"""Options of the server that serves an app, as they are given: NAME=VALUE. Pure.

Only the server, which is imported in the workers, knows its options; `steer.child.servers.options`
reads the values by what it says of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


def from_table(table: Mapping[str, object]) -> list[str]:
    """The options of a table, as NAME=VALUE: strings as they are, all else as in JSON."""
    return [f"{name}={_as_text(value)}" for name, value in table.items()]


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
