"""`python -m vm.trial POLICY`: a policy on the demo, with a small load; who got what, and its cost.

The guest's side of `./dev vm run`, and as good on the host. The same as `steer policies check`,
`steer run` and `steer status` one after the other, in one process: see `vm.service`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from bench.machine import pinned
from steer.cli.main import cli
from steer.policy.builtin import KERNEL
from vm import ending, service
from vm.promises import Broken, Clients

_LOG = Path("service.log")


@click.command(help="Try POLICY, a name or a FILE.c, on the demo. Needs root.")
@click.argument("policy")
@click.option("--connections", default=400, show_default=True, help="From all CPUs in turn.")
@click.option("--udp", is_flag=True, help="Datagrams instead, each of a flow of its own.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Of the policy.")
def main(policy: str, connections: int, udp: bool, params: Sequence[str]) -> None:
    if policy.endswith(".c"):
        policy = str(Path(policy).resolve())
    with service.home():
        if policy != KERNEL:  # which has no program
            _steer("policies", "check", policy)
            click.echo()
        try:
            _try(policy, connections, udp, params)
        except Broken as error:
            sys.exit(f"{error}\n{service.last_words(_LOG)}")


def _try(policy: str, connections: int, udp: bool, params: Sequence[str]) -> None:
    scheme = "udp" if udp else "tcp"
    options = ("--policy", policy, *(f"--param={param}" for param in params))
    with service.serving(scheme, options, _LOG):
        clients = Clients(service.status, sorted(os.sched_getaffinity(0)))
        for cpu, number in _shares(clients.cpus, connections):
            with pinned(cpu):
                for _ in range(number):
                    clients.send(0) if udp else clients.ask()
        click.echo(
            f"{connections} {'datagrams' if udp else 'connections'}, from all CPUs in turn\n"
        )
        _steer("status")


def _shares(cpus: Sequence[int], connections: int) -> Iterator[tuple[int, int]]:
    """Of each CPU."""
    for index, cpu in enumerate(cpus):
        yield cpu, (connections + index) // len(cpus)


def _steer(*arguments: str) -> None:
    """Raises SteerError: as that command does."""
    cli(arguments, standalone_mode=False)


if __name__ == "__main__":
    sys.exit(ending.run(main, "python -m vm.trial"))
