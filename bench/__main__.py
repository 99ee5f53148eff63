"""`./dev bench [NAME...] [--json] [--quick] ...`. A bench is a module and a row here."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
import msgspec

from bench import (
    attach,
    cost,
    crash,
    experiment,
    growth,
    hang,
    inspect,
    kept,
    leaks,
    locality,
    machine,
    markdown,
    memory,
    plot,
    preload,
    reload,
    start,
    swap,
    tail,
)
from bench.figures import Section
from steer.cli import output
from steer.errors import SteerError


@dataclass(frozen=True)
class Bench:
    """Args: run: measures; told whether to be quick about it."""

    summary: str
    run: Callable[[bool], Iterable[Section]]


BENCHES: Mapping[str, Bench] = {
    "cost": Bench("what a choice costs, by policy", cost.run),
    "start": Bench("from exec to the first answer", start.run),
    "preload": Bench("starts and memory of Python apps that steer serves", preload.run),
    "memory": Bench("what the controller holds, and does while idle", memory.run),
    "growth": Bench("how everything grows with the number of workers", growth.run),
    "leaks": Bench("what starts and stops leave behind", leaks.run),
    "locality": Bench("connections handled on the CPU of their packets", locality.run),
    "reload": Bench("requests that fail while workers are replaced", reload.run),
    "hang": Bench("what becomes of requests when a worker is stopped", hang.run),
    "tail": Bench("how long requests take, by policy and beside others", tail.run),
    "kept": Bench("requests in kept connections, by server and backend", kept.run),
    "swap": Bench("what is lost while policies are changed, and how long that takes", swap.run),
    "experiment": Bench("from an edited policy to its figures", experiment.run),
    "inspect": Bench("how long it takes to look at 5,000 sockets", inspect.run),
    "attach": Bench("what `steer attach` is worth to servers that run, and takes", attach.run),
    "crash": Bench("requests that fail while workers are killed", crash.run),
}
EPILOG = "\b\n" + "\n".join(f"{name:<10} {bench.summary}" for name, bench in BENCHES.items())


@click.command(
    epilog=EPILOG, help="Measure; all of them, or those named. Needs root and a quiet machine."
)
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHES)), metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every single value.")
@click.option(
    "--markdown", "tables", type=click.Path(path_type=Path), metavar="FILE", help="Write tables."
)
@click.option(
    "--plot", "directory", type=click.Path(path_type=Path), metavar="DIR", help="Draw them there."
)
@click.option("--quick", is_flag=True, help="Only see that it runs: figures mean little.")
def main(
    names: Sequence[str], as_json: bool, tables: Path | None, directory: Path | None, quick: bool
) -> None:
    if not machine.is_root():
        raise click.ClickException("measuring needs root: BPF, and a network namespace of its own")
    signal.signal(signal.SIGTERM, _leave)  # so that what was started is ended
    if directory and not plot.is_possible():
        raise click.ClickException("no matplotlib; install it: ./dev setup bench")
    here = machine.describe()
    machine.leave_network()
    found, failed = _measure(names or list(BENCHES), quick)
    if as_json:
        _print_json(here, found)
    else:
        click.echo("  ".join(f"{key} {value}" for key, value in here.items()) + "\n")
        sections = [section for each in found.values() for section in each]
        output.tables([section.table() for section in sections if section.figures])
    if tables:
        tables.write_text("\n".join(markdown.text(each) for each in found.values()))
    if directory:
        for path in plot.draw(found, directory):
            click.echo(f"bench: drawn: {path}", err=True)
    sys.exit(1 if failed else 0)


def _measure(names: Sequence[str], quick: bool) -> tuple[dict[str, list[Section]], bool]:
    """Run these; what fails says so, and the others go on."""
    found: dict[str, list[Section]] = {}
    failures = []
    for name in dict.fromkeys(names):
        click.echo(f"bench: {name}: {BENCHES[name].summary}", err=True)
        found[name] = []
        try:
            for section in BENCHES[name].run(quick):
                found[name].append(section)
        except SteerError as error:
            failures.append(f"{name}: {error}\n{error.detail}".rstrip())
        failures += [f"{name}: {each}" for section in found[name] for each in section.failures]
    for failure in failures:
        click.echo(f"bench: not measured: {failure}", err=True)
    return found, bool(failures)


def _print_json(here: Mapping[str, object], found: Mapping[str, Sequence[Section]]) -> None:
    benches = {
        name: [
            {"title": each.title, "figures": [figure.describe() for figure in each.figures]}
            for each in sections
        ]
        for name, sections in found.items()
    }
    value = {"schema": 1, "machine": here, "benches": benches}
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main(prog_name="bench")
