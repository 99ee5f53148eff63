"""The command line. Whatever takes time to import is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from steer import __version__

if TYPE_CHECKING:
    from steer.config import Service
    from steer.report import Table

DEFAULT_FILE = "steer.toml"
_Command = Callable[..., Any]


def main() -> None:
    """The `steer` command."""
    from steer.errors import SteerError

    _open_standard_streams()
    try:
        try:
            cli(standalone_mode=False)
        finally:
            sys.stdout.flush()
    except SteerError as error:
        _complain(str(error), error.detail)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # who read our output has had enough of it
            _complain(str(error), "")
        # Or what could not be written would be tried, and complained of, once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - no traceback ever reaches a user
        _complain(f"bug in steer: {type(error).__name__}: {error}", _where(error))
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="steer")
def cli() -> None:
    """Choose, in the kernel, which worker gets the next connection."""


def service_options(command: _Command) -> _Command:
    """The options of `run`: the keys of the configuration, with dashes."""
    for option in reversed(_SERVICE_OPTIONS):
        command = option(command)
    return command


_SERVICE_OPTIONS = (
    click.argument("app", required=False, metavar="[MODULE:CALLABLE | -- CMD ARG...]"),
    click.option(
        "-b",
        "--bind",
        multiple=True,
        metavar="ADDR",
        help="host:port, [::1]:port, :port or udp://host:port; may be repeated.",
    ),
    click.option("-w", "--workers", metavar="N|auto", help="auto: one for each CPU."),
    click.option("--policy", metavar="NAME", help="See `steer policies`. Default: cpu."),
    click.option("--weights", metavar="N,N...", help="Each worker's share; default 1."),
    click.option("--backend", metavar="NAME", help="auto, ebpf, cbpf or kernel."),
    click.option("--strict", is_flag=True, default=None, help="Refuse to fall back."),
    click.option("--name", help="Of the service; default from what it runs."),
    click.option(
        "-c",
        "--config",
        "file",
        metavar="FILE",
        help=f"TOML, table [service]; {DEFAULT_FILE} in this directory if there.",
    ),
    click.option("-u", "--user", help="Run workers as this user."),
    click.option("-g", "--group", help="Run workers as this group."),
    click.option("-e", "--env", multiple=True, metavar="K=V", help="Set in the workers."),
    click.option("--chdir", metavar="DIR", help="Where the workers run."),
    click.option("--backlog", metavar="N", help="Of each worker's socket; default 2048."),
    click.option("--graceful-timeout", metavar="S", help="To finish, when ending; default 30."),
    click.option("--ready-timeout", metavar="S", help="To get ready, when starting; default 30."),
    click.option("--pid", metavar="FILE", help="Write the controller's process id there."),
    click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error."),
    click.option("--log-format", metavar="FORMAT", help="text or json."),
    click.option("--control-socket", metavar="PATH", help="Instead of /run/steer/NAME.sock."),
)

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_CONTROL_SOCKET = click.option(
    "--control-socket", metavar="PATH", help="Where the service listens."
)


class _TakesCommand(click.Command):
    """What stands behind `--` is the worker's command, and not ours to read."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if "--" in arguments:
            at = arguments.index("--")
            context.meta["command"] = arguments[at + 1 :]
            if not arguments[at + 1 :]:
                raise click.UsageError("no command after --", context)
            arguments = arguments[:at]
        return super().parse_args(context, arguments)


@cli.command(cls=_TakesCommand)
@service_options
@click.option("--check-config", is_flag=True, help="Read the configuration, then end.")
@click.option("--print-config", is_flag=True, help="Print what is configured, then end.")
def run(check_config: bool, print_config: bool, **options: Any) -> None:
    """Run a service in the foreground: a Python callable, a command, or the demo."""
    service = _service(options)
    if print_config:
        from steer.config import as_toml

        click.echo(as_toml(service))
    if check_config or print_config:
        return
    from steer import controller, log
    from steer.kernel import probe, topology
    from steer.plan import plan

    decided = plan(service, topology.read(), probe.findings())
    logger = log.Log(service.log_level, service.log_format)
    sys.exit(controller.run(decided, os.environ, logger))


@cli.command(cls=_TakesCommand)
@service_options
@_AS_JSON
def check(as_json: bool, **options: Any) -> None:
    """Say what `run` with the same options would do, and why; change nothing."""
    from steer import controller
    from steer.kernel import probe, topology
    from steer.plan import plan

    decided = plan(_service(options), topology.read(), probe.findings())
    controller.rehearse(decided, os.environ)
    if as_json:
        _print_json(decided.describe())
        return
    for number, step in enumerate(decided.steps(), 1):
        reason = f"  ({step.reason})" if step.reason else ""
        click.echo(f"{number}. {step.act.value} {step.object}{reason}")


@cli.command()
@click.argument("name", required=False)
@_AS_JSON
@click.option("--watch", is_flag=True, help="Again every second, until interrupted.")
@_CONTROL_SOCKET
def status(name: str | None, as_json: bool, watch: bool, control_socket: str | None) -> None:
    """Show what runs: policy, backend and why, workers, counters."""
    from steer import client, report, show

    def current() -> report.Status:
        if name or control_socket:
            return client.status(client.locate(name, control_socket, os.environ))
        return client.status_of_all(os.environ)

    def tables() -> list[Table]:
        return [report.service_table(service) for service in current().services]

    if watch:
        show.again(lambda: _print_json(current())) if as_json else show.watch(tables)
    elif as_json:
        _print_json(current())
    else:
        found = tables()
        show.tables(found)
        if not found:
            click.echo("no service is running")


@cli.command()
@click.argument("name", required=False)
@click.option("--quick", is_flag=True, help="Do not wait for what is under way.")
@_AS_JSON
@_CONTROL_SOCKET
def stop(name: str | None, quick: bool, as_json: bool, control_socket: str | None) -> None:
    """Stop a service; return when it has ended."""
    from steer import client

    path = client.locate(name, control_socket, os.environ)
    client.stop(path, quick)
    if as_json:
        _print_json({"stopped": path.stem})
    else:
        click.echo(f"stopped {path.stem}")


@cli.command()
@_AS_JSON
def policies(as_json: bool) -> None:
    """List the policies and the backends each can run on."""
    from steer import show
    from steer.policy import POLICIES
    from steer.report import Table

    if as_json:
        _print_json(
            {
                "policies": [
                    {"name": each.name, "backends": each.backends, "summary": each.summary}
                    for each in POLICIES.values()
                ]
            }
        )
        return
    rows = [(each.name, ", ".join(each.backends), each.summary) for each in POLICIES.values()]
    show.tables([Table("", ("policy", "backends", "chooses"), rows)])


@cli.command(cls=_TakesCommand)
@service_options
@_AS_JSON
def doctor(as_json: bool, **options: Any) -> None:
    """Say what this machine can do, what is missing, and how to get it.

    Takes the options of `run`, to look with a service in mind: "warn" is what it would
    do without, "fail" what would keep it from starting as asked. Exit status 1 if
    anything fails, else 0.
    """
    from steer import doctor as examination
    from steer import show
    from steer.report import Table

    found = examination.examine(_service(options))
    if as_json:
        _print_json({"findings": found})
    else:
        rows = [(each.topic, each.verdict, each.found, each.cure) for each in found]
        show.tables([Table("", ("topic", "", "found", "what would help"), rows)])
    sys.exit(any(each.verdict == "fail" for each in found))


def _service(options: dict[str, Any]) -> Service:
    """The configuration from all its sources."""
    from steer import config
    from steer.errors import ConfigError

    path = options.pop("file") or os.environ.get("STEER_CONFIG")
    given = path or DEFAULT_FILE
    try:
        with open(given, "rb") as stream:
            table = config.read(stream.read(), given)
    except FileNotFoundError:
        if path is not None:
            raise ConfigError(f"read {given}", "no such file") from None
        table = {}
    except OSError as error:
        raise ConfigError(f"read {given}", error.strerror or str(error)) from None
    options["command"] = tuple(click.get_current_context().meta.get("command", ()))
    if options["weights"] is not None:
        options["weights"] = options["weights"].split(",")
    return config.load(options, os.environ, table, given)


def _print_json(value: object) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _open_standard_streams() -> None:
    """Where one is closed, a file opened later would stand there, and be written to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
            os.set_inheritable(number, True)


def _where(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join(f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in frames)


def _complain(message: str, detail: str) -> None:
    click.echo(f"steer: {message}", err=True)
    for line in detail.splitlines():
        click.echo(f"  | {line}", err=True)
