"""The table of commands that a running service can be asked for.

The command line, the client and the controller all read it; CONTRIBUTING.md says where the rest of
a command is. It imports nothing that takes long: `steer --help` reads it, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Args:
        done: the past participle: what the command line says when it has succeeded.
        outcome: the class in `control/outcomes.py` that its answer has the fields of; "": its
            answer is no outcome.
        argument: what the command line takes after the name of the service: N, SLOT or POLICY.
        carries: the keys of its request that the handler may read.
        flags: options of the command line without a value, as keys.
        options: options of the command line with a value, as keys.
    """

    name: str
    done: str = ""
    outcome: str = ""
    argument: str = ""
    carries: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


_ROWS = (
    Command("status"),
    Command("stop", "stopped", carries=("quick",), flags=("quick",)),
    Command("reload", "reloaded", "Reloaded"),
    Command("scale", "scaled", "Scaled", "N", ("workers", "more")),
    Command("drain", "drained", "Drained", "SLOT", ("slot",)),
    Command("undrain", "undrained", "Drained", "SLOT", ("slot",)),
    Command("restart", "restarted", "Restarted", "SLOT", ("slot",)),
    Command(
        "policy",
        "changed",
        "Swapped",
        "POLICY",
        ("policy", "params", "weights"),
        options=("weights",),
    ),
)
COMMANDS: Mapping[str, Command] = {each.name: each for each in _ROWS}
