"""The options of `run`, and the configuration they are one source of."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from steer.config import Service

DEFAULT_FILE = "steer.toml"
_APP = re.compile(r"[\w.]+:[\w.]+")
Command = Callable[..., Any]
"""A function that is to be one of the command line's."""


def service_options(command: Command) -> Command:
    """The options of `run`: the keys of the configuration, with dashes."""
    for option in reversed(_SERVICE_OPTIONS):
        command = option(command)
    return command


_SERVICE_OPTIONS = (
    click.argument("app", required=False, metavar="[MODULE:CALLABLE | -- CMD ARG...]"),
    click.option(
        "--demo",
        is_flag=True,
        default=None,
        help="Run the demo if neither is given; the default without any option and file.",
    ),
    click.option(
        "-b",
        "--bind",
        multiple=True,
        metavar="ADDR",
        help="host:port, [::1]:port, :port or udp://host:port; may be repeated.",
    ),
    click.option(
        "-w", "--workers", metavar="N|auto", help="How many; default auto: one for each CPU."
    ),
    click.option(
        "--policy",
        metavar="auto|NAME|FILE.c",
        help="Default auto: least-conn where open connections can be counted, else hash.",
    ),
    click.option(
        "--param",
        "params",
        multiple=True,
        metavar="NAME=VALUE",
        help="Of the policy; may be repeated.",
    ),
    click.option("--weights", metavar="N,N...", help="Each worker's share; default 1."),
    click.option("--backend", metavar="NAME", help="auto, ebpf, cbpf or kernel."),
    click.option("--strict", is_flag=True, default=None, help="Refuse to fall back."),
    click.option("--name", metavar="NAME", help="Of the service; default from what it runs."),
    click.option(
        "-c",
        "--config",
        "file",
        metavar="FILE",
        help=f"TOML, table [service]; {DEFAULT_FILE} in this directory if there.",
    ),
    click.option("-u", "--user", metavar="NAME|UID", help="Run workers as this user."),
    click.option("-g", "--group", metavar="NAME|GID", help="Run workers as this group."),
    click.option(
        "--keep-privileges",
        is_flag=True,
        default=None,
        help="Leave workers steer's capabilities, and let them gain others.",
    ),
    click.option("-e", "--env", multiple=True, metavar="K=V", help="Set in the workers."),
    click.option("--chdir", metavar="DIR", help="Where the workers run."),
    click.option("--backlog", metavar="N", help="Of each worker's socket; default 2048."),
    click.option(
        "--socket-option",
        "socket_options",
        multiple=True,
        metavar="NAME=VALUE",
        help="Of each worker's socket: keepalive=yes, rcvbuf=4M; may be repeated; nodelay is on."
        " See docs/SOCKETS.md.",
    ),
    click.option(
        "--graceful-timeout",
        metavar="S",
        help="Seconds a worker gets to finish open requests before it is killed; default 30.",
    ),
    click.option(
        "--stop-signal",
        metavar="SIG",
        help="Tells a worker to finish: QUIT; default what the server is known for, else TERM.",
    ),
    click.option(
        "--ready-timeout", metavar="S", help="Seconds a worker gets to become ready; default 30."
    ),
    click.option(
        "--hang-timeout",
        metavar="S",
        help="Seconds connections may wait at a worker that takes none; default 2, 0: for ever.",
    ),
    click.option(
        "--hang", metavar="replace|skip", help="What to do with such a worker; default replace."
    ),
    click.option(
        "--watchdog",
        metavar="S",
        help="Seconds within which each worker has to say WATCHDOG=1 again.",
    ),
    click.option(
        "--adopt-timeout",
        metavar="S",
        help="Seconds workers go on without a controller; default 30, 0: not at all.",
    ),
    click.option("--pid", metavar="FILE", help="Write the controller's process id there."),
    click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error."),
    click.option("--log-format", metavar="FORMAT", help="text or json, of all on standard error."),
    click.option(
        "--control-socket",
        metavar="PATH",
        help="Instead of /run/steer/NAME.sock; see also STEER_RUNTIME_DIR.",
    ),
)


class TakesCommand(click.Command):
    """What stands behind `--` is the worker's command, and not ours to read."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if "--" in arguments:
            at = arguments.index("--")
            context.meta["command"] = arguments[at + 1 :]
            if not arguments[at + 1 :]:
                raise click.UsageError("no command after --", context)
            _see_no_option(self, context, arguments[:at], arguments[at + 1 :])
            _see_no_command(self, context, arguments[:at], arguments[at + 1 :])
            arguments = arguments[:at]
        else:
            _see_no_command(self, context, arguments)
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
"""Keys of the configuration that are not given as options -> how they are."""


def _see_no_option(
    command: click.Command, context: click.Context, before: Sequence[str], after: Sequence[str]
) -> None:
    """Raises UsageError: what stands behind `--` begins with an option of ours."""
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
        words = f"{after[0]} stands behind --, where the command begins."
        line = _line(context, [*before, *after[:at]], after[at:])
        raise click.UsageError(f"{words} {line}", context)


def _line(context: click.Context, options: Sequence[str], command: Sequence[str]) -> str:
    """What to type."""
    import shlex

    line = shlex.join((*context.command_path.split(), *options, "--", *command))
    return f"A command goes after --: {line}"


def _see_no_command(
    command: click.Command,
    context: click.Context,
    arguments: Sequence[str],
    after: Sequence[str] = (),
) -> None:
    """Raises UsageError: of these, one begins a command, and `--` was forgotten.

    Args:
        after: what stands behind a `--` that came too late.
    """
    parser = command.make_parser(context)
    parser.allow_interspersed_args = False
    try:
        given, rest, _ = parser.parse_args(list(arguments))
    except click.UsageError:  # before it: told as ever
        return
    at = len(arguments) - len(rest) - 1
    first = given.get("app")
    if at < 0 or first != arguments[at] or _APP.fullmatch(first):
        return
    import shutil

    from steer import servers

    is_command = first in servers.HAND_OVER or shutil.which(first)
    if is_command or (rest and not rest[0].startswith("-")):
        line = _line(context, arguments[:at], [*arguments[at:], *after])
        raise click.UsageError(f"{first} is no MODULE:CALLABLE. {line}", context)


class Source:
    """Where the configuration comes from: called, it is read anew, all of it.

    A relative FILE is looked for where the command was started, and so is a policy's. The
    default one may be missing, but not once it has been there.

    Args:
        options: of the command that is under way, as `service_options` gives them.
        runs: whether it is to be of something that can run: see `config.load`.
    """

    def __init__(self, options: Mapping[str, Any], *, runs: bool = True) -> None:
        self._runs = runs
        self._command_line = dict(options)
        file = self._command_line.pop("file") or os.environ.get("STEER_CONFIG")
        self._file = file or DEFAULT_FILE
        self._must_be_there = bool(file)
        self._directory = _directory()
        self._command_line["command"] = click.get_current_context().meta.get("command", ())
        if options["weights"] is not None:
            self._command_line["weights"] = options["weights"].split(",")

    def __call__(self) -> Service:
        """The configuration as it is now.

        Raises:
            ConfigError: names what cannot be read, or cannot be.
        """
        import msgspec

        from steer import config
        from steer.policy import OWN_SUFFIX

        sources = self._command_line, os.environ, self._table(), self._file
        service = config.load(*sources, runs=self._runs)
        if not service.policy.endswith(OWN_SUFFIX):
            return service
        path = os.path.normpath(os.path.join(self._directory, service.policy))
        return msgspec.structs.replace(service, policy=path)

    def _table(self) -> dict[str, Any] | None:
        """What the file says; None if there is none. Raises ConfigError."""
        from steer import config
        from steer.errors import ConfigError

        try:
            with open(os.path.join(self._directory, self._file), "rb") as stream:
                table = config.read(stream.read(), self._file)
        except FileNotFoundError:
            if self._must_be_there:
                raise ConfigError(f"read {self._file}", "no such file") from None
            return None
        except OSError as error:
            raise ConfigError(f"read {self._file}", error.strerror or str(error)) from None
        self._must_be_there = True
        return table


def _directory() -> str:
    """Of this process; "" if it has been removed: then no relative file is in it either."""
    with suppress(OSError):
        return os.getcwd()
    return ""
