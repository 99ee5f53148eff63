"""The options of `run` for click, and its error messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from steer.cli.options import APP, APP_METAVAR, OPTIONS, Option

Command = Callable[..., Any]
"""A function that becomes a command."""


def service_options(command: Command) -> Command:
    """The options of `run` that configure a service."""
    command = with_options(OPTIONS)(command)
    return click.argument("app", required=False, metavar=APP_METAVAR)(command)


def with_options(options: Sequence[Option]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = _click_option(option)(command)
        return command

    return add


def _click_option(option: Option) -> Callable[[Command], Command]:
    names = (*option.names, option.key)
    if not option.metavar:
        return click.option(*names, is_flag=True, default=None, help=option.help)
    return click.option(
        *names, multiple=option.is_multiple, metavar=option.metavar, help=option.help
    )


def given_command() -> Sequence[str]:
    """The arguments after `--` of the current command."""
    command: Sequence[str] = click.get_current_context().meta.get("command", ())
    return command


class TakesCommand(click.Command):
    """A steer command that takes the command line of the workers after `--`, without parsing
    it."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if "--" in arguments:
            at = arguments.index("--")
            context.meta["command"] = arguments[at + 1 :]
            if not arguments[at + 1 :]:
                raise click.UsageError("no command after --", context)
            _refuse_option_after_dashes(self, context, arguments[:at], arguments[at + 1 :])
            _refuse_command_without_dashes(self, context, arguments[:at], arguments[at + 1 :])
            arguments = arguments[:at]
        else:
            _refuse_command_without_dashes(self, context, arguments)
        try:
            return super().parse_args(context, arguments)
        except click.NoSuchOption as error:
            if cure := _NO_OPTIONS.get(error.option_name.removeprefix("--")):
                words = f"No such option '{error.option_name}'. {cure}"
                raise click.UsageError(words, context) from None
            raise


_NO_OPTIONS = {
    "app": "The app is an argument: MODULE:CALLABLE.",
    "command": "The command goes after --.",
}
"""Keys of the configuration that are not options, and how to give them."""


def _refuse_option_after_dashes(
    command: click.Command, context: click.Context, before: Sequence[str], after: Sequence[str]
) -> None:
    """Raises UsageError: the arguments after `--` begin with an option of steer."""
    if not after[0].startswith("-"):
        return
    parser = command.make_parser(context)
    parser.allow_interspersed_args = False
    try:
        given, rest, _ = parser.parse_args(list(after))
    except click.UsageError:
        return
    at = len(after) - len(rest) - 1
    if given.get("app") == after[at]:
        words = f"{after[0]} is after --, where the command begins."
        line = _line(context, [*before, *after[:at]], after[at:])
        raise click.UsageError(f"{words} {line}", context)


def _line(context: click.Context, options: Sequence[str], command: Sequence[str]) -> str:
    """Advice with the command line that was probably meant."""
    import shlex

    line = shlex.join((*context.command_path.split(), *options, "--", *command))
    return f"A command goes after --: {line}"


def _refuse_command_without_dashes(
    command: click.Command,
    context: click.Context,
    arguments: Sequence[str],
    after: Sequence[str] = (),
) -> None:
    """Find a command without a `--` before it.

    Args:
        after: the arguments after a `--` that follows the command's first word.

    Raises:
        UsageError: one of the arguments begins a command.
    """
    parser = command.make_parser(context)
    parser.allow_interspersed_args = False
    try:
        given, rest, _ = parser.parse_args(list(arguments))
    except click.UsageError:  # an error before the command: click reports it
        return
    at = len(arguments) - len(rest) - 1
    first = given.get("app")
    if at < 0 or first != arguments[at] or APP.fullmatch(first):
        return
    import shutil

    from steer.config import servers

    is_command = first in servers.LISTEN_CURES or shutil.which(first)
    if is_command or (rest and not rest[0].startswith("-")):
        line = _line(context, arguments[:at], [*arguments[at:], *after])
        raise click.UsageError(f"{first} is not MODULE:CALLABLE. {line}", context)
