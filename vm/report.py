"""What the kernels of a matrix said, and the tables made of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from steer.cli.tables import Table
from steer.features import Answer, Finding
from steer.policy.builtin import EBPF

MIGRATE, COUNT = "migrate", "count"
_NEEDS = {"plain": EBPF, "migrate": MIGRATE, "count": EBPF}
"""What a kernel has to have, to take a program of that name. Not COUNT, which is that it does."""
_Key = TypeVar("_Key")
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Machine(msgspec.Struct, frozen=True, tag_field="kind", tag="machine"):
    """Where it ran.

    Args:
        release, version: as uname(2) has them; Debian's own version is in the latter.
        cpu: its model, which tells emulation.
        probes: by backend, MIGRATE and COUNT.
    """

    release: str
    version: str
    cpu: str
    cpus: int
    probes: Mapping[str, Finding]


class Cell(msgspec.Struct, tag_field="kind", tag="cell"):
    """A policy on a backend.

    Args:
        asked: the backend that it was started with.
        got: the one it stood on; "" if it did not come up.
        reason: why no better one.
        works: whether that backend kept what the policy promises there.
        detail: what was seen, or what went wrong.
        notes: what the service said of itself besides.
        took_s: from its start to its end.
    """

    policy: str
    asked: str
    got: str = ""
    reason: str = ""
    works: bool = False
    detail: str = ""
    notes: list[str] = []
    took_s: float = 0.0


class Verified(msgspec.Struct, frozen=True, tag_field="kind", tag="verifier"):
    """What a program asks of this kernel's verifier; see `verifier.Figures`.

    Args:
        program: "policy/program".
        error: why it was refused.
        detail: the last lines of the verifier's log.
    """

    program: str
    instructions: int = 0
    processed: int = 0
    stack_bytes: int = 0
    error: str = ""
    detail: str = ""


Record = Machine | Cell | Verified


class Kernel(msgspec.Struct, frozen=True):
    """All that one kernel said."""

    machine: Machine
    cells: Mapping[tuple[str, str], Cell]
    programs: Mapping[str, Verified]

    @property
    def name(self) -> str:
        return self.machine.release


def read(lines: Iterable[bytes | str]) -> Kernel:
    """What `python -m vm.cells` printed, as far as it came.

    Raises:
        msgspec.DecodeError: a line is none of its own.
        ValueError: not even the machine is there.
    """
    decoder = msgspec.json.Decoder[Record](Record)
    records = [decoder.decode(line) for line in lines]
    machines = [each for each in records if isinstance(each, Machine)]
    if len(machines) != 1:
        raise ValueError(f"{len(machines)} machines in the records of one kernel")
    return Kernel(
        machines[0],
        {(each.policy, each.asked): each for each in records if isinstance(each, Cell)},
        {each.program: each for each in records if isinstance(each, Verified)},
    )


# ---- what nobody can explain


def unexplained(kernels: Sequence[Kernel]) -> list[str]:
    """Every cell that does not work, that fell back without a reason, or that one kernel has
    and another lacks; and every program refused where the kernel has what it needs."""
    found = []
    for kernel in kernels:
        for at in _union(each.cells for each in kernels):
            why = _of_cell(kernel.cells.get(at))
            found += [f"{kernel.name}: {at[0]} on {at[1]}: {why}"] if why else []
        for name in _union(each.programs for each in kernels):
            why = _of_program(kernel, kernel.programs.get(name))
            found += [f"{kernel.name}: {name}: {why}"] if why else []
    return found


def _of_cell(cell: Cell | None) -> str:
    if cell is None:
        return "not tried"
    if not cell.works:
        return cell.detail or "does not work"
    if cell.got != cell.asked and not cell.reason:
        return f"stands on {cell.got}, and does not say why"
    return ""


def _of_program(kernel: Kernel, program: Verified | None) -> str:
    if program is None:
        return "not tried"
    if not program.error or _lacking(kernel, program.program):
        return ""
    return f"{program.error}\n{program.detail}".rstrip()


def _lacking(kernel: Kernel, program: str) -> str:
    """Why the kernel cannot take any program of its kind; "" if it can."""
    needed = kernel.machine.probes.get(_NEEDS[program.rpartition("/")[2]])
    return str(needed.note) if needed and needed.answer is Answer.NO else ""


# ---- tables


class _Footnotes:
    """Each is told once, and has the same mark wherever it belongs."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, *texts: str) -> str:
        """What to put behind something; nothing for texts that are empty."""
        numbers = (self._numbers.setdefault(t, len(self._numbers) + 1) for t in texts if t)
        return "".join(f" {each}".translate(_RAISED) for each in numbers)

    def lines(self) -> list[str]:
        return [f"{number}".translate(_RAISED) + f" {t}" for t, number in self._numbers.items()]


def tables(kernels: Sequence[Kernel]) -> list[Table]:
    """The kernels, what policies do on them, and what their verifiers say."""
    found = (_machines(kernels), _policies(kernels), _verifier(kernels))
    return [table for table in found if table.rows]


def _machines(kernels: Sequence[Kernel]) -> Table:
    notes = _Footnotes()
    probed = _union(each.machine.probes for each in kernels)
    rows = [
        (
            kernel.name,
            kernel.machine.version,
            f"{kernel.machine.cpus} × {kernel.machine.cpu}",
            *(_found(kernel.machine.probes.get(name), notes) for name in probed),
        )
        for kernel in kernels
    ]
    return Table("Kernels", ("kernel", "version", "CPUs", *probed), rows, notes.lines())


def _found(finding: Finding | None, notes: _Footnotes) -> str:
    return finding.answer.value + notes.mark(str(finding.note)) if finding else "–"


def _policies(kernels: Sequence[Kernel]) -> Table:
    notes = _Footnotes()
    rows = [
        (*at, *(_outcome(each.cells.get(at), notes) for each in kernels))
        for at in _union(each.cells for each in kernels)
    ]
    return _by_kernel("Policies", ("policy", "asked for"), kernels, rows, notes)


def _outcome(cell: Cell | None, notes: _Footnotes) -> str:
    if cell is None:
        return "not tried"
    if not cell.works:
        return "does not work" + notes.mark(cell.detail)
    if cell.got == cell.asked:
        # Of what the other backends cannot do nothing depends on the kernel.
        return "works" + notes.mark(*(cell.notes if cell.got == EBPF else ()))
    return f"→ {cell.got}" + notes.mark(cell.reason.removeprefix(f"backend = {cell.asked}; "))


def _verifier(kernels: Sequence[Kernel]) -> Table:
    notes = _Footnotes()
    rows = [
        (
            name,
            _numbers(kernels, name, lambda program: program.instructions),
            _numbers(kernels, name, lambda program: program.stack_bytes),
            *(_processed(each, name, notes) for each in kernels),
        )
        for name in _union(each.programs for each in kernels)
    ]
    columns = ("program", "instructions", "stack, bytes")
    return _by_kernel("Instructions the verifier processed", columns, kernels, rows, notes)


def _numbers(kernels: Sequence[Kernel], name: str, of: Callable[[Verified], int]) -> str:
    """One, or the least and the most where kernels differ."""
    programs = [each.programs[name] for each in kernels if name in each.programs]
    found = [of(program) for program in programs if not program.error]
    return "–".join(str(each) for each in sorted({min(found), max(found)})) if found else "–"


def _processed(kernel: Kernel, name: str, notes: _Footnotes) -> str:
    program = kernel.programs.get(name)
    if program is None:
        return "not tried"
    if program.error:
        return "refused" + notes.mark(_lacking(kernel, name) or program.error)
    return str(program.processed)


def _by_kernel(
    title: str,
    columns: Sequence[str],
    kernels: Sequence[Kernel],
    rows: Sequence[Sequence[str]],
    notes: _Footnotes,
) -> Table:
    return Table(title, (*columns, *(each.name for each in kernels)), rows, notes.lines())


def _union(each: Iterable[Iterable[_Key]]) -> list[_Key]:
    """What is in any, once, in the order they come."""
    return list(dict.fromkeys(key for keys in each for key in keys))


# ---- for the docs


def markdown(kernels: Sequence[Kernel], command: str) -> str:
    """All tables as a document's body.

    Args:
        command: that made it.
    """
    head = f"Made by `{command}`.\n"
    return "\n".join([head, *(_markdown(each) for each in tables(kernels))])


def _markdown(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(map(_one_line, row)) + " |" for row in rows]
    below = ["", *(f"{_one_line(line)}  " for line in table.below)] if table.below else []
    return "\n".join([f"## {table.title}", "", *lines, *below, ""])


def _one_line(text: str) -> str:
    """On one line, with nothing that ends a cell."""
    return " ".join(text.split()).replace("|", r"\|")
