"""The commands that act on a running service. Each returns when the service has done it.

Simple arguments are read without click, as importing click takes almost as long as everything
else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from steer.cli.options import words
from steer.control.commands import COMMANDS as TABLE

COMMANDS = tuple(name for name, command in TABLE.items() if command.done)


def plain(command: str, arguments: Sequence[str]) -> Callable[[], None] | None:
    """Read the arguments of one of `COMMANDS`, if they are simple.

    Returns:
        The call that click would make; None if click has to parse the arguments or report what is
        wrong with them.
    """
    row = TABLE[command]
    flags = {"--json": "as_json", **_by_option(row.flags)}
    valued = {"--control-socket": "control_socket", **_by_option(row.options)}
    read = words(arguments, flags, valued)
    return None if read is None else _call_for(command, *read)


def _by_option(keys: Sequence[str]) -> Mapping[str, str]:
    return {f"--{key}": key for key in keys}


def _call_for(command: str, names: list[str], how: Mapping[str, Any]) -> Callable[[], None] | None:
    argument = TABLE[command].argument
    what = names.pop() if names and argument else None
    if len(names) > 1:
        return None
    name = names[0] if names else None
    if command == "stop":
        return partial(stop, name, **how)
    if not argument:
        return partial(perform, command, name, **how)
    if what is None:
        return None
    if command == "policy":
        return partial(change_policy, name, what, **how)
    from steer import values

    try:
        return partial(perform, command, name, **NUMBERS[argument](what), **how)
    except values.Invalid:
        return None


def _workers(text: str) -> Mapping[str, int]:
    """A number of workers; with a sign, a difference. Raises values.Invalid."""
    from steer import values
    from steer.config import service

    if text[:1] not in ("+", "-"):
        return {"workers": values.whole_number(text, 0, service.MAX_WORKERS)}
    number = values.whole_number(text[1:], 1, service.MAX_WORKERS)
    return {"more": number if text[0] == "+" else -number}


def _slot(text: str) -> Mapping[str, int]:
    """Raises values.Invalid."""
    from steer import abi, values

    return {"slot": values.whole_number(text, 0, abi.MAX_SLOTS - 1)}


NUMBERS: Mapping[str, Callable[[str], Mapping[str, Any]]] = {"N": _workers, "SLOT": _slot}
"""For each argument that is a number: a function from its text to fields of the request."""


def perform(
    command: str, name: str | None, as_json: bool, control_socket: str | None, **more: Any
) -> None:
    """Send a command to a service, wait until it is done, and print the outcome."""
    import msgspec

    from steer.cli import output
    from steer.control import client, find

    path = find.locate(name, control_socket, os.environ)
    called = name or path.stem
    with output.progress(f"{command} {called}") as progress:
        outcome = client.perform(path, command, progress, **more)
    done = TABLE[command].done
    if as_json:
        output.as_json({done: called, **msgspec.to_builtins(outcome)})
    else:
        print(f"{done} {called}: {outcome}")


def change_policy(
    name: str | None,
    policy: str,
    weights: str | None,
    params: Sequence[str] = (),
    **how: Any,
) -> None:
    """Change the policy of a service. A path is relative to our current directory."""
    from steer.policy.builtin import CUSTOM_SUFFIX

    if policy.endswith(CUSTOM_SUFFIX):
        policy = os.path.abspath(policy)
    shares = weights.split(",") if weights else None
    perform("policy", name, policy=policy, params=params or None, weights=shares, **how)


def stop(name: str | None, quick: bool, as_json: bool, control_socket: str | None) -> None:
    """Stop a service, or abandoned workers of one; return when they have ended."""
    from steer.cli import output
    from steer.control import client, find

    abandoned = find.abandoned_services(os.environ, name, control_socket)
    if len(abandoned) == 1:
        called = abandoned[0].name
        with output.progress(f"stop {called}"):
            find.end_abandoned(abandoned[0], quick, directory=control_socket is None)
    else:
        path = find.locate(name, control_socket, os.environ)
        called = name or path.stem
        with output.progress(f"stop {called}") as progress:
            client.stop(path, quick, progress)
    if as_json:
        output.as_json({TABLE["stop"].done: called})
    else:
        print(f"{TABLE['stop'].done} {called}")
