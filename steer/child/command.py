"""Runs the command of a service in the process of a worker."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from steer.child import privileges
from steer.child.launch import FIRST_FD, Launch
from steer.child.setup import needed
from steer.config.address import Bind
from steer.linux import descriptors, fork, reach


def execute(launch: Launch, environment: Mapping[str, str]) -> None:
    """Execute the command, with its sockets from descriptor 3 on, as sd_listen_fds(3) says.

    Raises:
        Unloadable: the command does not exist or cannot be executed.
    """
    arguments = fill_in(launch.service.command, launch.slot, launch.service.binds)
    given = _give_sockets(launch.binds) if launch.binds else {}
    descriptors.limit_descriptors(launch.files)
    with needed(f"run {arguments[0]}", lambda error: _why(error, arguments[0], environment)):
        fork.execute(arguments, {**environment, **given})


def _give_sockets(binds: Sequence[Bind]) -> dict[str, str]:
    """Let the program inherit the sockets. Returns the variables that tell it of them."""
    for index in range(len(binds)):
        os.set_inheritable(FIRST_FD + index, True)
    return {
        "LISTEN_FDS": str(len(binds)),
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": ":".join(f"{bind.protocol}-{bind.port}" for bind in binds),
    }


def _why(error: OSError, program: str, environment: Mapping[str, str]) -> str:
    """What may have prevented the execution of a program, and what would help."""
    if isinstance(error, FileNotFoundError):
        return fork.venv_hint(program)
    with suppress(OSError):  # the current directory was removed
        if isinstance(error, PermissionError):
            search = os.get_exec_path(dict(environment))
            return privileges.described(reach.to_command(program, search))
    return ""


def fill_in(command: Sequence[str], slot: int, binds: Sequence[Bind]) -> list[str]:
    """The command's arguments with {slot}, {fd}, {port} filled in.

    {fd} and {port} belong to the first bind, {fd1} and {port1} to the second, and so on. Other
    braces stay as they are.
    """
    marks = {"{slot}": str(slot), "{fd}": str(FIRST_FD), "{port}": str(binds[0].port)}
    for index, bind in enumerate(binds):
        marks[f"{{fd{index}}}"] = str(FIRST_FD + index)
        marks[f"{{port{index}}}"] = str(bind.port)
    filled = list(command)
    for mark, value in marks.items():
        filled = [argument.replace(mark, value) for argument in filled]
    return filled
