"""The table of commands that a running service can be asked for.

The command line, the client and the controller all read it. To add a command, add a row here, a
handler in `controller/requests.py` and a click function in `cli/main.py`.

It imports nothing that takes long: `steer --help` reads it, too.
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
    """

    name: str
    done: str = ""
    outcome: str = ""
    argument: str = ""
    carries: tuple[str, ...] = ()


_ROWS = (
    Command("status"),
    Command("stop", "stopped", carries=("quick",)),
    Command("reload", "reloaded", "Reloaded"),
    Command("scale", "scaled", "Scaled", "N", ("workers", "more")),
    Command("drain", "drained", "Drained", "SLOT", ("slot",)),
    Command("undrain", "undrained", "Drained", "SLOT", ("slot",)),
    Command("restart", "restarted", "Restarted", "SLOT", ("slot",)),
    Command("policy", "changed", "Swapped", "POLICY", ("policy", "params", "weights")),
)
COMMANDS: Mapping[str, Command] = {each.name: each for each in _ROWS}
