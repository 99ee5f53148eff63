"""The command line. Each command imports what takes time to import when it needs it."""

from __future__ import annotations

import sys
from typing import Any

import click

from steer import __version__
from steer.cli import ask, entry
from steer.cli.arguments import TakesCommand, given_command, service_options, with_options
from steer.cli.numbered import Named, numbered
from steer.cli.options import RUN_OPTIONS, Given, Source


def main() -> None:
    """The `steer` command."""
    entry.guarded(_perform)


def _perform() -> None:
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        if entry.log_format() == "json":
            entry.complain(error.format_message())
        else:
            error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="steer")
def cli() -> None:
    """Run several workers on one port; the kernel selects one per connection."""


@cli.command("help")
@click.argument("names", nargs=-1, metavar="[COMMAND]...")
@click.pass_context
def help_(context: click.Context, names: tuple[str, ...]) -> None:
    """Show the help of a command, or the list of commands."""
    assert context.parent is not None
    about, command = context.parent, context.parent.command
    for name in names:
        if not isinstance(command, click.Group):
            raise click.UsageError(f"No such command {name!r}.", about)
        _, found, _ = command.resolve_command(about, [name])
        assert found is not None
        about, command = click.Context(found, about, info_name=name), found
    click.echo(command.get_help(about))


_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_NETNS = click.option("--netns", metavar="N", help="Network namespace: a name, path or process id.")
_CONTROL_SOCKET = click.option(
    "--control-socket", metavar="PATH", help="Control socket of the service."
)


@cli.command(cls=TakesCommand)
@service_options
@with_options(RUN_OPTIONS)
def run(**options: Any) -> None:
    """Run a service: a Python callable, a command, or the demo.

    steer stays in the foreground until the service ends.
    """
    from steer.cli import run

    run.perform(Given(options, given_command()))


@cli.command(cls=TakesCommand)
@service_options
@_AS_JSON
def check(as_json: bool, **options: Any) -> None:
    """Show what `run` would do, and why.

    Takes the options of `run` and changes nothing.
    """
    from steer.cli import check

    check.perform(Source(options, given_command())(), as_json)


@cli.command()
@click.argument("where", metavar="ADDR:PORT")
@click.option("--policy", default="auto", metavar="NAME|FILE.c", help="Policy; default auto.")
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a parameter of the policy; can be repeated.",
)
@click.option("--weights", metavar="N,N...", help="Share of each slot; default 1 each.")
@click.option("--name", metavar="NAME", help="Name of the service; default: PROGRAM-PORT.")
@_NETNS
@click.option("--replace", is_flag=True, help="Replace the program there; put it back at the end.")
@click.option(
    "--log-level", default="info", metavar="LEVEL", help="Log from this level up; default info."
)
@click.option(
    "--log-format", default="text", metavar="FORMAT", help="Format of the log; default text."
)
@_CONTROL_SOCKET
def attach(where: str, **how: Any) -> None:
    """Steer the listeners or UDP sockets of a running server.

    A UDP address is written udp://ADDR:PORT. steer stays in the foreground until it is interrupted
    or `steer detach` ends it; then the kernel selects again as before. The server is not restarted
    and notices nothing.
    """
    from steer.cli import attach

    attach.attach(where, **how)


@cli.command()
@click.argument("name", required=False, metavar="[NAME|ADDR:PORT]")
@_NETNS
@_AS_JSON
@_CONTROL_SOCKET
def detach(name: str | None, **how: Any) -> None:
    """End `steer attach`: the kernel's hash selects again."""
    from steer.cli import attach

    attach.detach(name, **how)


@cli.command()
@click.argument("name", required=False)
@_AS_JSON
@click.option("--watch", is_flag=True, help="Print again every second until interrupted.")
@_CONTROL_SOCKET
def status(name: str | None, as_json: bool, watch: bool, control_socket: str | None) -> None:
    """Show running services: policy, backend, workers, counters."""
    from steer.cli.status import Query, perform

    perform(Query(name, as_json, watch, control_socket))


@cli.command()
@click.argument("name", required=False)
@click.option("--quick", is_flag=True, help="Do not wait for open requests.")
@_AS_JSON
@_CONTROL_SOCKET
def stop(name: str | None, **how: Any) -> None:
    """Stop a service and wait until it has ended."""
    ask.stop(name, **how)


@cli.command()
@click.argument("name", required=False)
@_AS_JSON
@_CONTROL_SOCKET
def reload(name: str | None, **how: Any) -> None:
    """Read the configuration again and replace all workers.

    Old workers exit once as many new ones are ready. If the new ones do not start, nothing
    changes.
    """
    ask.perform("reload", name, **how)


@cli.command(context_settings={"ignore_unknown_options": True})  # "-1" is a number
@numbered("N")
@_AS_JSON
@_CONTROL_SOCKET
def scale(named: Named, **how: Any) -> None:
    """Set the number of workers to N; +N adds N, -N removes N."""
    ask.perform("scale", named[0], **named[1], **how)


@cli.command()
@numbered("SLOT")
@_AS_JSON
@_CONTROL_SOCKET
def drain(named: Named, **how: Any) -> None:
    """Stop sending new connections to the worker in SLOT.

    It keeps its open connections.
    """
    ask.perform("drain", named[0], **named[1], **how)


@cli.command()
@numbered("SLOT")
@_AS_JSON
@_CONTROL_SOCKET
def undrain(named: Named, **how: Any) -> None:
    """Send new connections to the worker in SLOT again."""
    ask.perform("undrain", named[0], **named[1], **how)


@cli.command()
@numbered("SLOT")
@_AS_JSON
@_CONTROL_SOCKET
def restart(named: Named, **how: Any) -> None:
    """Replace the worker in SLOT; it exits when the new one is ready."""
    ask.perform("restart", named[0], **named[1], **how)


@cli.command()
@click.argument("named", nargs=-1, metavar="[NAME] POLICY")
@click.option("--weights", metavar="N,N...", help="Share of each worker; default: unchanged.")
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a parameter of the policy; can be repeated.",
)
@_AS_JSON
@_CONTROL_SOCKET
def policy(
    named: tuple[str, ...], weights: str | None, params: tuple[str, ...], **how: Any
) -> None:
    """Switch to another POLICY, or to other parameters.

    POLICY is a name or the path of a file: ./mine.c. No connection is lost or misrouted.
    """
    if not named:
        raise click.UsageError("Missing argument 'POLICY'.")
    *name, chosen = named
    if len(name) > 1:
        raise click.UsageError(f"Got unexpected extra argument ({chosen})")
    ask.change_policy(name[0] if name else None, chosen, weights, params, **how)


@cli.group(invoke_without_command=True)
@_AS_JSON
@click.pass_context
def policies(context: click.Context, as_json: bool) -> None:
    """List policies; create and check your own.

    Shows the backends and parameters of each policy.
    """
    if context.invoked_subcommand:
        return
    from steer.cli import policies

    policies.overview(as_json)


@policies.command()
@click.argument("name")
@_AS_JSON
def new(name: str, as_json: bool) -> None:
    """Write NAME.c, a commented template of a policy."""
    from steer.cli import policies

    policies.new(name, as_json)


@policies.command("check")
@click.argument("file")
@click.option("--verbose", is_flag=True, help="If the verifier refuses FILE, show its whole log.")
@_AS_JSON
def check_policy(file: str, verbose: bool, as_json: bool) -> None:
    """Compile the policy in FILE and measure its cost.

    The kernel's verifier checks the program. Errors point at the line of C.
    """
    from steer.cli import policies

    policies.check(file, verbose, as_json)


@cli.command("inspect")
@click.argument("target", required=False, metavar="[ADDR:PORT|PORT|PID]")
@click.option(
    "--for", "count_for", metavar="TIME", help="Count connections and datagrams for: 5s, 500ms, 2m."
)
@click.option(
    "--netns", metavar="N", help="Look in that network namespace only: a name, path or process id."
)
@_AS_JSON
@click.pass_context
def inspect_(
    context: click.Context,
    target: str | None,
    count_for: str | None,
    netns: str | None,
    as_json: bool,
) -> None:
    """Show which processes share a port, and what selects one.

    Shows every socket that serves, or those of an address, a port or a process. Works on any
    server, whether steer runs it or not, and changes nothing. As root it also shows BPF programs
    and other network namespaces.
    """
    from steer.cli import inspect

    assert context.parent is not None
    assert isinstance(context.parent.command, click.Group)
    attach = context.parent.command.commands.get("attach")
    params = attach.params if attach else []
    options = frozenset(option for param in params for option in param.opts)
    inspect.perform(target, count_for, netns, as_json, options)


@cli.command(cls=TakesCommand)
@service_options
@_AS_JSON
def doctor(as_json: bool, **options: Any) -> None:
    """Show what this machine can do, and how to get what is missing.

    Takes the options of `run`, to judge for that service. "warn" means that the service would
    run without something, "fail" that it would not start as asked. The exit status is 1 if a
    check fails, else 0.
    """
    from steer.cli import doctor

    doctor.perform(Source(options, given_command(), runs=False)(), as_json)
