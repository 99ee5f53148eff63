"""Every policy on every backend of several kernels, and the tests that are about the kernel."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from steer.show import tables
from vm import boot, cache, report, root
from vm.boot import Machine
from vm.errors import VmError

HOST = "host"
"""The kernel of this machine, without a VM."""
KERNEL_TESTS = (
    "tests/test_bpf.py",
    "tests/test_kernel_policies.py",
    "tests/test_kernel_cbpf.py",
    "tests/test_source.py",
    "tests/test_flow.py",
    "tests/test_least_conn.py",
    "tests/test_listeners.py",
    "tests/test_diag.py",
    "tests/test_own_policy.py::test_built_in_policies_ask_no_more_of_the_verifier",
    "-k",
    "not tcp6 and not udp6 and not dual_stack and not wildcard",
)
"""About what the kernel does more than about what we do: these the matrix runs everywhere. Not
again over IPv6, which shares with IPv4 what chooses: emulated, they take long enough."""
VM_TESTS = "vm/tests"
"""Of many CPUs, receive queues and NUMA nodes, which the guest has whatever this machine has."""
_CELLS = ("python", "-m", "vm.cells")
_PYTEST = ("python", "-m", "pytest", "-q", "-rs", "--timeout=900", "-p", "no:cacheprovider")
_SKIPPED = re.compile(r"SKIPPED \[(\d+)\] \S+ (.*)")
_COUNTED = re.compile(r"^=*\s*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s")


_HEAD = """# What works on which kernel

Each policy was asked for on each backend, as a service of `steer run` with a worker on every CPU,
and what it promises was seen with real connections: `cpu` from every CPU, `round-robin` to the last
turn, `least-conn` with connections that stay, and so on (`vm/promises.py`). *Works* means that the
promise was kept on the backend that was asked for; an arrow, that another was used, why, and that
the promise was kept as far as that one can. A cell that does neither fails the run.
"""


class Tests(msgspec.Struct):
    """What pytest said.

    Args:
        outcome: "520 passed, 14 skipped".
        skipped: how many, by why.
    """

    status: int = 0
    outcome: str = "did not end"
    skipped: dict[str, int] = {}

    def hear(self, line: str) -> None:
        if found := _SKIPPED.match(line):
            self.skipped[found[2]] = self.skipped.get(found[2], 0) + int(found[1])
        elif found := _COUNTED.match(line):
            self.outcome = found[1]


class Ran(msgspec.Struct):
    """What was seen on one kernel."""

    kernel: report.Kernel
    tests: Tests


def run(machine: Machine | None, tests: Sequence[str], show: Callable[[str], None]) -> Ran:
    """Cells, and then tests.

    Args:
        machine: None for the kernel of this one.
        tests: for pytest; none run none.
        show: gets what pytest prints.

    Raises:
        VmError: the guest did not come up, or broke off.
    """
    cells: list[str] = []
    seen = Tests()

    def hear(line: str) -> None:
        if line.startswith("{"):
            cells.append(line)
            cache.say(_summary(line))
        else:
            seen.hear(line)
            show(line)

    steps = [_CELLS, *([(*_PYTEST, *tests)] if tests else [])]
    seen.status = _steps(machine, steps, hear)
    if not tests:
        seen.outcome = "none were run"
    try:
        return Ran(report.read(cells), seen)
    except ValueError as error:  # a guest that broke off in the middle
        release = machine.kernel.release if machine else HOST
        raise VmError(f"read what {release} said", str(error)) from None


def tests_for(machine: Machine | None) -> Sequence[str]:
    return (*KERNEL_TESTS, VM_TESTS) if machine else KERNEL_TESTS


def show(ran: Sequence[Ran]) -> None:
    tables(report.tables([each.kernel for each in ran]))
    for line in _tests(ran):
        print(line)


def _summary(line: str) -> str:
    try:
        record = msgspec.json.decode(line, type=report.Record)
    except msgspec.DecodeError:
        return line.rstrip()
    if isinstance(record, report.Machine):
        return f"{record.release}, {record.version}"
    if isinstance(record, report.Verified):
        return f"{record.program}: {record.error or f'{record.processed} processed'}"
    works = f"works on {record.got}" if record.works else "DOES NOT WORK"
    return f"{record.policy} on {record.asked}: {works}, {record.took_s} s"


def _steps(
    machine: Machine | None, steps: Sequence[Sequence[str]], hear: Callable[[str], None]
) -> int:
    """One after the other, whatever becomes of them; the worst exit status."""
    if machine:
        script = "s=0; " + "".join(f"{shlex.join(step)} || s=$?; " for step in steps) + "exit $s"
        return boot.run(machine, ["sh", "-c", script], heard=hear)
    return max(_on_host(step, hear) for step in steps)


def _on_host(step: Sequence[str], hear: Callable[[str], None]) -> int:
    command = [sys.executable, *step[1:]]
    with subprocess.Popen(command, cwd=root.TREE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        try:
            for line in child.stdout:
                hear(line)
        except BaseException:
            child.terminate()
            raise
    return child.returncode


def unexplained(ran: Sequence[Ran]) -> list[str]:
    """What is wrong with what was seen: none of it should be there."""
    failed = [
        f"{each.kernel.name}: tests: {each.tests.outcome}" for each in ran if each.tests.status
    ]
    return report.unexplained([each.kernel for each in ran]) + failed


def markdown(ran: Sequence[Ran], command: str) -> str:
    """The whole of docs/KERNELS.md."""
    kernels = [each.kernel for each in ran]
    return "\n".join([_HEAD, report.markdown(kernels, command), *_tests(ran)])


def _tests(ran: Iterable[Ran]) -> Iterable[str]:
    yield "## Tests\n"
    for each in ran:
        yield f"- {each.kernel.name}: {each.tests.outcome}"
        for why, number in sorted(each.tests.skipped.items()):
            yield f"    - {number} skipped: {why}"
    yield ""


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.rename(path)
