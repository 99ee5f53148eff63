"""The arguments [NAME] and N or SLOT of commands that act on a running service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from steer.cli import ask
from steer.cli.arguments import Command

Named = tuple[str | None, Mapping[str, Any]]
"""The name of a service, if given, and the number as part of a request."""


def numbered(number: str) -> Callable[[Command], Command]:
    """Add the arguments [NAME] and a number to a command. A single argument is the number."""

    def read(context: click.Context, _: click.Parameter, given: tuple[str, ...]) -> Named:
        from steer import values

        if not given:
            raise click.UsageError(f"Missing argument '{number}'.", context)
        *name, text = given
        if len(name) > 1:
            raise click.UsageError(f"Got unexpected extra argument ({text})", context)
        try:
            found = ask.NUMBERS[number](text)
        except values.Invalid as error:
            if name and _is_number(number, name[0]):
                right = f"{context.command_path} {text} {name[0]}"
                raise click.UsageError(f"The name comes first: {right}", context) from None
            words = f"{values.shown(text)} is {error}."
            raise click.BadParameter(words, context, param_hint=number) from None
        if name and name[0].startswith("-"):
            raise click.NoSuchOption(name[0], ctx=context)
        return (name[0] if name else None, found)

    return click.argument(
        "named",
        nargs=-1,
        metavar=f"[NAME] {number}",
        callback=read,
        type=click.UNPROCESSED,
    )


def _is_number(number: str, text: str) -> bool:
    from steer import values

    try:
        return bool(ask.NUMBERS[number](text))
    except values.Invalid:
        return False
