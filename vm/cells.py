"""`python -m vm.cells [POLICY]...`: what becomes of every policy on every backend of this kernel.

Prints a line of JSON for the machine, for each program and for each cell; see
`vm.report`. Services are forked from here, not executed: where all is emulated, a start
of Python takes longer than all the rest.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import click
import msgspec

from bench import machine
from steer import features
from steer.backends.connections import Counting
from steer.errors import SteerError
from steer.features import Answer, Finding
from steer.loader import compile, probe, verifier
from steer.loader.programs import ATTACH_TYPES
from steer.policy.builtin import BACKENDS, CBPF, EBPF, KERNEL, POLICIES
from steer.policy.bytecode import Code
from steer.policy_tools import new
from vm import ending, promises, service
from vm.promises import DATAGRAMS, OWN, Broken, Clients
from vm.report import COUNT, MIGRATE, Cell, Machine, Record, Verified

NAMES = (*POLICIES, OWN)
_OWN_FILE = "mine.c"
_OWN_OPTIONS = ("--policy", f"./{_OWN_FILE}", "--param", "percent=100")


@click.command(help="Say how each policy does on each backend; all, or those named. Needs root.")
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[POLICY]...")
def main(names: Sequence[str]) -> None:
    with service.home():
        new.begin(_OWN_FILE)
        for each in _records(names or NAMES):
            print(msgspec.json.encode(each).decode(), flush=True)


def _records(names: Sequence[str]) -> Iterator[Record]:
    yield _machine()
    for name in names:
        yield from _verified(name)
    for name in names:
        for asked in BACKENDS if name != KERNEL else (KERNEL,):
            yield _cell(name, asked)


# ---- what the kernel is


def _machine() -> Machine:
    about = machine.describe()
    probes: dict[str, Callable[[], Finding]] = {
        EBPF: partial(probe.ask, features.EBPF),
        MIGRATE: partial(probe.ask, features.MIGRATE),
        COUNT: _count,
        CBPF: partial(probe.ask, features.CBPF),
    }
    return Machine(
        os.uname().release,
        os.uname().version,
        about["cpu"],
        len(os.sched_getaffinity(0)),
        {name: ask() for name, ask in probes.items()},
    )


def _count() -> Finding:
    """Can open connections be counted?"""
    try:
        with closing(Counting(1)) as counting:
            why_not = counting.why_not
    except SteerError as error:
        return Finding.of(Answer.NO, error.note)
    return Finding.of(Answer.NO, why_not) if why_not else Finding(Answer.YES)


def _verified(name: str) -> Iterator[Verified]:
    """Each program of a policy by itself: one that is refused does not keep others from it."""
    source = Path(_OWN_FILE) if name == OWN else compile.sources() / f"{name}.c"
    if name == KERNEL:  # whose only program is the one that counts, as it does for all
        name, source = "open", compile.sources() / "open.c"
    try:
        programs = compile.load(source).programs
    except SteerError as error:
        yield Verified(f"{name}/plain", error=str(error), detail=error.detail)
        return
    # Programs that look at the kernel need its types: `steer attach` tries them where it runs.
    for kind in filter(ATTACH_TYPES.get, programs):
        yield _figures(name, kind, programs[kind])


def _figures(name: str, kind: str, code: Code) -> Verified:
    program = f"{name}/{kind}"
    try:
        with ExitStack() as stack:
            found = verifier.figures(kind, code, verifier.maps_of([code], stack))
    except SteerError as error:
        return Verified(program, error=str(error), detail=error.detail)
    return Verified(program, found.instructions, found.processed, found.stack_bytes)


# ---- what services do


def _cell(name: str, asked: str) -> Cell:
    """One service, from start to end. Whatever goes wrong, the others are still to come."""
    cell, begun_s = Cell(name, asked), time.monotonic()
    log = Path(f"{name}-{asked}.log")
    try:
        scheme = "udp" if name in DATAGRAMS else "tcp"
        which = _OWN_OPTIONS if name == OWN else ("--policy", name)
        with service.serving(scheme, (*which, "--backend", asked), log):
            cell.detail = _seen(cell)
        cell.works = True
    except Exception as error:  # noqa: BLE001 - it is told
        cell.detail = f"{type(error).__name__}: {error}\n{service.last_words(log)}".rstrip()
    cell.took_s = round(time.monotonic() - begun_s, 2)
    return cell


def _seen(cell: Cell) -> str:
    """See that the service keeps its promise, and note what it says of itself."""
    status = service.status()
    cell.got, cell.reason = status.backend, status.backend_reason or ""
    cell.notes = status.notes
    clients = Clients(service.status, sorted(os.sched_getaffinity(0)))
    seen = promises.check(cell.policy, cell.got, clients)
    totals = service.status().totals
    if cell.got == EBPF and (totals.selected, totals.fallback) != (clients.asked, 0):
        raise Broken(f"asked {clients.asked} times, and counted {totals}")
    return seen


if __name__ == "__main__":
    sys.exit(ending.run(main, "python -m vm.cells"))
