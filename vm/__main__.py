"""`./dev vm`: kernels other than this machine's, with this tree in them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from steer.errors import NoCompiler, SteerError
from steer.loader import compile
from steer.policy.builtin import POLICIES
from vm import boot, ending, kernels, matrix
from vm.boot import Machine
from vm.errors import VmError

_KERNEL_HELP = f"Debian's newest of a series ({', '.join(kernels.SERIES)}, ...), or a bzImage."
_Command = Callable[..., int]


class _Commands(click.Group):
    """Where no command is named, `boot` is meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            for word in takewhile(lambda word: word != "--", args):
                if word in self.commands:
                    raise click.UsageError(f"{word} comes before its options; or say: -- {word}")
            args.insert(0, "boot")
        return super().parse_args(ctx, args)


def _machine(command: _Command) -> _Command:
    """The options of the machine."""
    for option in (
        click.option("--qemu", default="", metavar="ARGS", help="Further arguments for qemu."),
        click.option(
            "--memory",
            "memory_mib",
            type=click.IntRange(512),
            default=4096,
            show_default=True,
            metavar="MIB",
            help="Of the guest.",
        ),
        click.option("--nodes", type=click.IntRange(1), help="NUMA nodes; two if CPUs are even."),
        click.option("--cpus", type=click.IntRange(1, 255), default=8, show_default=True),
    ):
        command = option(command)
    return command


_kernel = click.option(
    "--kernel", default=kernels.SERIES[-1], show_default=True, metavar="KERNEL", help=_KERNEL_HELP
)


@click.group("./dev vm", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Boot a kernel with this tree in it, through virtme-ng, with 8 CPUs.

    Under KVM where that works, else emulated, which is some 15 times slower. Kernels and the
    guest's root file system are kept in ~/.cache/steer/vm. Where no command is named it is boot,
    whose options ./dev vm boot --help tells.
    """


@main.command("boot", context_settings={"allow_interspersed_args": False})
@_kernel
@_machine
@click.argument("command", nargs=-1)
def boot_(kernel: str, command: Sequence[str], **options: Any) -> int:
    """Run COMMAND in the tree, or a shell: ./dev vm -- uname -r"""
    machine = _wanted(kernel, **options)
    return boot.run(machine, command) if command else boot.shell(machine)


@main.command()
@click.option(
    "--kernel",
    "wanted",
    multiple=True,
    default=(*kernels.SERIES, matrix.HOST),
    show_default=True,
    metavar="KERNEL",
    help=f"{_KERNEL_HELP} Or {matrix.HOST}, this machine's. Again and again.",
)
@_machine
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what was found there.",
)
@click.option("--cells", is_flag=True, help="Only see what becomes of every policy; no tests.")
@click.argument("tests", nargs=-1)
def test(
    wanted: Sequence[str], report: Path | None, cells: bool, tests: Sequence[str], **options: Any
) -> int:
    """Every policy on every backend of every kernel, and the tests of the kernel's doing, or TESTS,
    as pytest takes them. Exits with 1 unless every policy works, or falls back and says why. Also
    on this machine's own kernel, for which it needs root, unless --kernel names others."""
    if cells and tests:
        raise click.UsageError("--cells runs no tests, but some are named")
    if report and not os.access(report.absolute().parent, os.W_OK):
        raise VmError(f"write {report}", "its directory is not there, or not to be written to")
    ran, wrong = [], []
    for name in wanted:
        try:
            machine = None if name == matrix.HOST else _wanted(name, **options)
            chosen = tests or matrix.tests_for(machine)
            ran.append(matrix.run(machine, () if cells else chosen, _echo))
        except SteerError as error:  # the others are still to come
            wrong.append("\n".join(filter(None, (str(error), error.detail))))
    if ran:
        matrix.show(ran)
    wrong += matrix.unexplained(ran)
    if report and ran:
        asked = shlex.join(["./dev", "vm", *sys.argv[1:]])
        matrix.write(report, matrix.markdown(ran, asked, wrong))
    for each in wrong:
        click.echo(f"vm: {each}", err=True)
    return 1 if wrong else 0


@main.command()
@_kernel
@_machine
@click.option("--policy", required=True, metavar="NAME|FILE.c", help="A name, or a file.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Of the policy.")
@click.option(
    "--connections",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="From all CPUs in turn.",
)
@click.option("--udp", is_flag=True, help="Datagrams instead, each of a flow of its own.")
def run(
    kernel: str,
    policy: str,
    params: Sequence[str],
    connections: int,
    udp: bool,
    **options: Any,
) -> int:
    """Try a policy in the VM, on the demo with a small load: what the kernel's verifier says of it,
    what a call costs, and which worker got how many. The cost is of an emulated machine, unless KVM
    works: compare it with another policy's."""
    is_file = policy.endswith(".c")
    if is_file and not Path(policy).is_file():
        raise VmError(f"policy {policy}", "no such file")
    if not is_file and policy not in POLICIES:
        raise VmError(f"policy {policy}", "unknown", f"{', '.join(POLICIES)}, or a FILE.c")
    machine = _wanted(kernel, **options)
    source = Path(policy).resolve()
    tried = f"/host/policy/{source.name}" if is_file else policy
    command = ["python", "-m", "vm.trial", tried]
    command += ["--connections", str(connections), *(["--udp"] if udp else [])]
    command += [f"--param={param}" for param in params]
    return boot.run(machine, command, _with_headers(source) if is_file else ())


def _with_headers(source: Path) -> Sequence[Path]:
    """The policy and what it includes; where only the guest has a compiler, all that may be."""
    try:
        return (source, *compile.read_by(source))
    except NoCompiler:
        return (source, *sorted(source.parent.glob("*.h")))


def _echo(line: str) -> None:
    click.echo(line, nl=False)


def _wanted(kernel: str, cpus: int, nodes: int | None, memory_mib: int, qemu: str) -> Machine:
    nodes = nodes or 2 - cpus % 2
    if cpus % nodes:
        raise click.UsageError(f"{cpus} CPUs cannot be parted among {nodes} nodes of equal size")
    return Machine(kernels.find(kernel), cpus, nodes, memory_mib - memory_mib % nodes, qemu)


if __name__ == "__main__":
    sys.exit(ending.run(main, "./dev vm"))
