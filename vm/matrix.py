"""Every policy on every backend of several kernels, and the tests that are about the kernel."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import msgspec

from steer.cli.output import tables
from steer.linux.fork import how_it_ended
from vm import boot, cache, report, root
from vm.boot import Machine
from vm.errors import VmError

HOST = "host"
"""The kernel of this machine, without a VM."""
KERNEL_TESTS = (
    "tests/kernel/loader/test_programs.py",
    "tests/service/test_kernel_policies.py",
    "tests/service/test_kernel_cbpf.py",
    "tests/service/test_source.py",
    "tests/service/test_flow.py",
    "tests/service/test_least_conn.py",
    "tests/service/test_early.py",
    "tests/kernel/sockets/test_listeners.py",
    "tests/kernel/attach/test_closing.py::test_slot_of_a_listener_that_closes_is_marked",
    "tests/kernel/attach/test_closing.py::test_new_listener_is_announced",
    "tests/kernel/linux/test_nic.py",
    "tests/service/test_custom_policy.py::test_built_in_policies_ask_no_more_of_the_verifier",
    "-k",
    "not tcp6 and not udp6 and not dual_stack and not wildcard",
)
"""About what the kernel does more than about what we do: these the matrix runs everywhere. Not
again over IPv6, which shares with IPv4 what chooses: emulated, they take long enough."""
VM_TESTS = "vm/tests"
"""Of many CPUs, receive queues and NUMA nodes, which the guest has whatever this machine has."""
_CELLS = ("python", "-m", "vm.cells")
_PYTEST = ("python", "-m", "pytest", "-q", "-rs", "--timeout=900", "-p", "no:cacheprovider")
_ENDED = "steer: ended with"
_CLEANED_UP_S = 60.0
_SKIPPED = re.compile(r"SKIPPED \[(\d+)\] \S+ (.*)")
_COUNTED = re.compile(r"^=*\s*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s")


_HEAD = """# What works on which kernel

Each policy was run on each backend, as a service of `steer run` with one worker per CPU. Real
connections tested what the policy promises: `cpu` with connections from every CPU, `round-robin` to
the last turn, `least-conn` with connections that stay open, and so on (`vm/promises.py`). *Works*
means that the policy kept its promise on the backend in the column *asked for*. An arrow means that
steer used another backend, for the reason in the footnote, and that the policy kept its promise as
far as that backend can. The run fails if a cell is neither.

`steer attach` works where the column *migrate* says yes, and is refused elsewhere with that reason.
`vm/tests/test_attach.py` attaches to a server, sees that it keeps to the policy, and that the
kernel's hash selects after a detach and after the attacher was killed. A listener that closes waits
50 µs for handshakes under way. Where all CPUs are emulated that may be too short: of all
connections to 6,000 listeners that closed under load, 5 were lost on 6.1, and 6 on 6.12.
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
    """What was seen on one kernel.

    Args:
        cells_status: that `vm.cells` ended with.
    """

    kernel: report.Kernel
    cells_status: int
    tests: Tests


class _Step(NamedTuple):
    """Args: hear: gets each line that the command prints."""

    command: Sequence[str]
    hear: Callable[[str], None]


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
    seen = Tests() if tests else Tests(0, "none were run")

    def hear_cells(line: str) -> None:
        if line.startswith("{"):
            cells.append(line)
            cache.say(_summary(line))
        else:
            show(line)

    def hear_tests(line: str) -> None:
        seen.hear(line)
        show(line)

    steps = [_Step(_CELLS, hear_cells)]
    if tests:
        steps.append(_Step((*_PYTEST, *tests), hear_tests))
    cells_status, *rest = _in_guest(machine, steps) if machine else [*map(_on_host, steps)]
    seen.status = rest[0] if rest else 0
    try:
        return Ran(report.read(cells), cells_status, seen)
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


def _in_guest(machine: Machine, steps: Sequence[_Step]) -> list[int]:
    """In one boot, one after the other whatever becomes of them; what each ended with."""
    script = "".join(f"{shlex.join(each.command)}; echo {_ENDED} $?; " for each in steps)
    statuses: list[int] = []

    def hear(line: str) -> None:
        said, mark, status = line.rpartition(_ENDED)
        if not mark:
            steps[len(statuses)].hear(line)
            return
        if said:  # it was killed in the middle of a line
            steps[len(statuses)].hear(f"{said}\n")
        statuses.append(int(status))

    broken_off = boot.run(machine, ["sh", "-c", f"{script}exit 0"], heard=hear)
    return statuses + [broken_off] * (len(steps) - len(statuses))


def _on_host(step: _Step) -> int:
    """In a session of its own: told to end once, by us, it has the time to clean up."""
    command = [sys.executable, *step.command[1:]]
    with subprocess.Popen(
        command, cwd=root.TREE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout
        try:
            for line in child.stdout:
                step.hear(line)
        except BaseException:
            _interrupt(child)
            raise
    return child.returncode


def _interrupt(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGINT)
    try:
        child.communicate(timeout=_CLEANED_UP_S)
    except subprocess.TimeoutExpired:
        child.kill()


def unexplained(ran: Sequence[Ran]) -> list[str]:
    """What is wrong with what was seen: none of it should be there."""
    found = report.unexplained([each.kernel for each in ran])
    for each in ran:
        name = each.kernel.name
        if each.cells_status:
            found.append(f"{name}: cells: {how_it_ended(each.cells_status)}")
        if each.tests.status:
            found.append(f"{name}: tests: {each.tests.outcome}")
    return found


def markdown(ran: Sequence[Ran], command: str, wrong: Sequence[str]) -> str:
    """The whole of docs/KERNELS.md. Args: wrong: what is not as it should be."""
    kernels = [each.kernel for each in ran]
    return "\n".join([_HEAD, report.markdown(kernels, command), *_tests(ran), *_wrong(wrong)])


def _wrong(wrong: Sequence[str]) -> Iterable[str]:
    if wrong:
        yield "## Not as it should be\n"
        yield from (f"- {indent(each, '    ').strip()}" for each in wrong)
        yield ""


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
