"""The options of `run`, and the configuration that is read from them.

Simple arguments of `run` are read without click, as importing click takes longer than the rest of
a start, apart from that of Python itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.config.service import Service

DEFAULT_FILE = "steer.toml"
APP = re.compile(r"[\w.]+:[\w.]+(\(\))?")


class Option:
    """An option of the command line.

    Args:
        names: its names; the last one is the long name.
        metavar: the name of its value; "": the option has no value.
        is_multiple: whether it can be repeated. All of its values count.
        renamed: its key in the configuration, if that differs from the long name.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        metavar: str,
        help: str,
        is_multiple: bool = False,
        renamed: str = "",
    ) -> None:
        self.names = names
        self.metavar = metavar
        self.help = help
        self.is_multiple = is_multiple
        self.key = renamed or names[-1].removeprefix("--").replace("-", "_")


APP_METAVAR = "[MODULE:CALLABLE | -- CMD ARG...]"
OPTIONS = (
    Option(
        ("--demo",),
        "",
        "Run the built-in demo; the default if there are no options and no file.",
    ),
    Option(("--preload",), "", "Load the app once, in a process that forks the workers."),
    Option(
        ("--server",),
        "NAME|auto",
        "Serve the app (ASGI, WSGI) in the workers: uvicorn, hypercorn or waitress.",
    ),
    Option(
        ("--server-option",),
        "NAME=VALUE",
        "Set an option of that server; can be repeated. See docs/APPS.md.",
        is_multiple=True,
        renamed="server_options",
    ),
    Option(
        ("-b", "--bind"),
        "ADDR",
        "Listen on host:port, [::1]:port, :port or udp://host:port; can be repeated.",
        is_multiple=True,
    ),
    Option(("-w", "--workers"), "N|auto", "Number of workers; default auto: one per CPU."),
    Option(
        ("--spares",),
        "N",
        "Number of workers kept ready to take the places of workers that fail; default 0.",
    ),
    Option(
        ("--socket",),
        "inherit|adopt",
        "inherit: steer opens the sockets of workers; adopt: the command opens them itself, with"
        " SO_REUSEPORT, and --workers is the number to wait for; default inherit.",
    ),
    Option(
        ("--instances",),
        "N",
        "With --socket adopt: number of servers to start; default 1.",
    ),
    Option(
        ("--policy",),
        "auto|NAME|FILE.c",
        "Policy; default auto: least-conn if connections can be counted, else hash.",
    ),
    Option(
        ("--param",),
        "NAME=VALUE",
        "Set a parameter of the policy; can be repeated.",
        is_multiple=True,
        renamed="params",
    ),
    Option(("--weights",), "N,N...", "Share of each worker; default 1 each."),
    Option(
        ("--backend",), "NAME", "Backend: ebpf, cbpf or kernel; default auto: the best that works."
    ),
    Option(("--strict",), "", "Fail instead of falling back to a lesser backend."),
    Option(("--name",), "NAME", "Name of the service; default: from the application or command."),
    Option(
        ("-c", "--config"),
        "FILE",
        f"Configuration file (TOML, table [service]); default {DEFAULT_FILE}, if it exists.",
        renamed="file",
    ),
    Option(("-u", "--user"), "NAME|UID", "Run workers as this user."),
    Option(("-g", "--group"), "NAME|GID", "Run workers as this group."),
    Option(("--keep-privileges",), "", "Let workers keep steer's capabilities and gain others."),
    Option(
        ("-e", "--env"),
        "K=V",
        "Set an environment variable in the workers; can be repeated.",
        is_multiple=True,
    ),
    Option(("--chdir",), "DIR", "Change to this directory in the workers."),
    Option(("--backlog",), "N", "Accept queue length of each worker; default 2048."),
    Option(
        ("--socket-option",),
        "NAME=VALUE",
        "Set on each worker's socket: keepalive=yes, rcvbuf=4M; default nodelay=yes; can be"
        " repeated. See docs/SOCKETS.md.",
        is_multiple=True,
        renamed="socket_options",
    ),
    Option(
        ("--graceful-timeout",),
        "S",
        "Seconds a worker gets to finish open requests before SIGKILL; default 30.",
    ),
    Option(
        ("--stop-signal",),
        "SIG",
        "Signal for a graceful stop; default: the one known for the server, else TERM.",
    ),
    Option(
        ("--reload-signal",),
        "SIG|none",
        "With --socket adopt: signal on which the server reloads itself; default: the one known for"
        " the server; none: a reload starts another server, then ends the old one.",
    ),
    Option(("--ready-timeout",), "S", "Seconds a worker gets to become ready; default 30."),
    Option(
        ("--hang-timeout",),
        "S",
        "Seconds connections may wait at a worker that accepts none; default 2, 0: no limit.",
    ),
    Option(("--hang",), "replace|skip", "What to do with a hung worker; default replace."),
    Option(
        ("--watchdog",),
        "S",
        "Seconds within which each worker must send WATCHDOG=1; default: not required.",
    ),
    Option(
        ("--max-memory",),
        "SIZE",
        "Replace a worker gracefully once it uses more memory, such as 512M; default: no limit.",
    ),
    Option(
        ("--max-lifetime",),
        "TIME",
        "Replace each worker gracefully after this time, such as 1h or 1h+-10m; default: never.",
    ),
    Option(
        ("--reload-on-change",),
        "",
        "Reload when a Python file of the application changes, for development.",
    ),
    Option(
        ("--adopt-timeout",),
        "S",
        "Seconds workers continue without a controller; default 30, 0: not at all.",
    ),
    Option(("--pid",), "FILE", "Write the controller's process ID to this file."),
    Option(
        ("--log-level",),
        "LEVEL",
        "Least severe lines to log: debug, info, warning or error; default info.",
    ),
    Option(("--log-format",), "FORMAT", "Format of the log: text or json; default text."),
    Option(
        ("--control-socket",),
        "PATH",
        "Path of the control socket; default: NAME.sock in /run/steer, or for users other than root"
        " in $XDG_RUNTIME_DIR/steer.",
    ),
)
"""The keys of the configuration, with dashes. For the app and the command see `Given`."""
RUN_OPTIONS = (
    Option(("--check-config",), "", "Check the configuration, then exit."),
    Option(("--print-config",), "", "Print the configuration, then exit."),
)
"""The options that only `run` has."""


class Given:
    """What `run` was given.

    Args:
        options: the options and the app, by key; None or (): not given.
        command: the arguments after `--`.
    """

    def __init__(self, options: Mapping[str, Any], command: Sequence[str]) -> None:
        self.options = options
        self.command = command


def plain(arguments: Sequence[str]) -> Given | None:
    """Read simple arguments of `run`: each option has its whole name and its value.

    Returns:
        The same as click; None if click has to parse them or report what is wrong.
    """
    own, command = list(arguments), list[str]()
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
        if not command or command[0].startswith("-"):
            return None
    options = (*OPTIONS, *RUN_OPTIONS)
    known = {name: option for option in options for name in option.names}
    given: dict[str, Any] = {each.key: () if each.is_multiple else None for each in options}
    given["app"] = None
    words = iter(own)
    for word in words:
        name, has_value, value = word.partition("=") if word.startswith("--") else (word, "", "")
        option = known.get(name)
        if option and option.metavar:
            value = value if has_value else next(words, "-")
            given[option.key] = (*given[option.key], value) if option.is_multiple else value
            is_plain = has_value or not value.startswith("-")
        elif option:
            given[option.key] = True
            is_plain = not has_value
        else:
            is_plain = given["app"] is None and bool(APP.fullmatch(word))
            given["app"] = word
        if not is_plain:
            return None
    return Given(given, tuple(command))


def words(
    arguments: Sequence[str], flags: Mapping[str, str], valued: Mapping[str, str]
) -> tuple[list[str], dict[str, Any]] | None:
    """Read simple arguments of a command: its arguments, and the values of its options by key.

    Args:
        flags: the keys of its options without a value, by the names of the options.
        valued: the keys of its options with a value, by the names of the options.

    Returns:
        The same as click; None if click has to parse them or report what is wrong.
    """
    names: list[str] = []
    given = {**dict.fromkeys(flags.values(), False), **dict.fromkeys(valued.values())}
    rest = iter(arguments)
    for word in rest:
        option, has_value, value = word.partition("=")
        if word in flags:
            given[flags[word]] = True
        elif option in valued:
            given[valued[option]] = value = value if has_value else next(rest, "-")
            if value.startswith("-"):
                return None
        elif word.startswith("-"):
            return None
        else:
            names.append(word)
    return names, given


class Source:
    """The source of the configuration. Each call reads all of it again.

    Relative paths of the file and of a policy start from the directory in which the command was
    started. The default file may be missing, but not once it has been read.

    Args:
        options: the options of a command, by key; None: not given.
        command: the command of the workers, if one was given.
        runs: whether the service is to be run; see `sources.load`.
    """

    def __init__(
        self, options: Mapping[str, Any], command: Sequence[str] = (), *, runs: bool = True
    ) -> None:
        self._runs = runs
        self._command_line = dict(options)
        file = self._command_line.pop("file") or os.environ.get("STEER_CONFIG")
        self._file = file or DEFAULT_FILE
        self._must_be_there = bool(file)
        self._directory = _directory()
        self._command_line["command"] = command
        if options["weights"] is not None:
            self._command_line["weights"] = options["weights"].split(",")

    def __call__(self) -> Service:
        """The configuration as it is now.

        Raises:
            ConfigError: names what cannot be read, or the wrong value.
        """
        import msgspec

        from steer.config.sources import load
        from steer.policy.builtin import CUSTOM_SUFFIX

        sources = self._command_line, os.environ, self._table(), self._file
        service = load(*sources, runs=self._runs)
        if not service.policy.endswith(CUSTOM_SUFFIX):
            return service
        path = os.path.normpath(os.path.join(self._directory, service.policy))
        return msgspec.structs.replace(service, policy=path)

    def _table(self) -> dict[str, Any] | None:
        """The table of the file; None: there is no file. Raises ConfigError."""
        from steer.config.sources import read
        from steer.errors import ConfigError

        try:
            with open(os.path.join(self._directory, self._file), "rb") as stream:
                table = read(stream.read(), self._file)
        except FileNotFoundError:
            if self._must_be_there:
                raise ConfigError(f"read {self._file}", "no such file") from None
            return None
        except OSError as error:
            raise ConfigError.from_oserror(f"read {self._file}", error) from None
        self._must_be_there = True
        return table


def _directory() -> str:
    """The current directory; "" if it was removed, as it then has no files."""
    with suppress(OSError):
        return os.getcwd()
    return ""
