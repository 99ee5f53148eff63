"""The report of a matrix: what it says, and what it does not let pass."""

from __future__ import annotations

import msgspec
import pytest

from steer.cli import tables as plainly
from steer.features import Answer, Finding
from steer.policy.builtin import CBPF, EBPF, KERNEL
from vm import report
from vm.report import MIGRATE, Cell, Kernel, Machine, Record, Verified

WHY = "Linux 5.10 cannot migrate connections; use Linux 5.14 or later"
NO = Finding(Answer.NO, WHY)


def kernel(*records: Record, release: str = "6.1", **probes: Finding) -> Kernel:
    machine = Machine(release, f"Debian {release}.9-1", "some CPU", 8, probes)
    return report.read(msgspec.json.encode(each) for each in (machine, *records))


def cell(policy: str, asked: str, got: str, reason: str = "") -> Cell:
    return Cell(policy, asked, got, reason, works=True)


def texts(*kernels: Kernel) -> str:
    return "\n\n".join(plainly.plain(table) for table in report.tables(kernels))


# ---- records


def test_records_are_read_as_they_were_written() -> None:
    records = cell("cpu", EBPF, CBPF, "why"), Verified("cpu/plain", 200, 300, 24)
    found = kernel(*records, migrate=NO)
    assert found.name == "6.1"
    assert found.machine.probes == {MIGRATE: NO}
    assert found.cells == {("cpu", EBPF): records[0]}
    assert found.programs == {"cpu/plain": records[1]}


@pytest.mark.parametrize("line", [b"Traceback", b"{}", b'{"kind":"other"}'])
def test_what_is_no_record_is_refused(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        report.read([line])


def test_records_of_no_machine_or_of_two_are_refused() -> None:
    one = msgspec.json.encode(kernel().machine)
    for lines in ([], [one, one]):
        with pytest.raises(ValueError, match=f"{len(lines)} machines"):
            report.read(lines)


# ---- what nobody can explain


@pytest.mark.parametrize(
    "found, why",
    [
        (Cell("cpu", EBPF, EBPF, detail="from CPU 1 to slot 0"), "from CPU 1 to slot 0"),
        (Cell("cpu", EBPF, EBPF), "does not work"),
        (cell("cpu", EBPF, CBPF), "stands on cbpf, and does not say why"),
    ],
)
def test_unexplained_cell(found: Cell, why: str) -> None:
    assert report.unexplained([kernel(found)]) == [f"6.1: cpu on ebpf: {why}"]


def test_what_works_or_says_why_it_fell_back_is_explained() -> None:
    cells = cell("cpu", EBPF, CBPF, "ebpf: EPERM"), cell("kernel", KERNEL, KERNEL)
    assert not report.unexplained([kernel(*cells, Verified("cpu/plain", 1, 1))])


def test_what_one_kernel_was_asked_all_have_to_tell() -> None:
    full = kernel(cell("cpu", EBPF, EBPF), Verified("cpu/plain", 1, 1), release="6.12")
    assert report.unexplained([full, kernel()]) == [
        "6.1: cpu on ebpf: not tried",
        "6.1: cpu/plain: not tried",
    ]
    assert texts(full, kernel()).count("not tried") == 2


def test_refused_program_is_explained_by_what_the_kernel_lacks() -> None:
    refused = Verified("cpu/migrate", error="refused", detail="R1 invalid")
    assert not report.unexplained([kernel(refused, migrate=NO)])
    for probes in ({}, {MIGRATE: Finding(Answer.YES)}, {MIGRATE: Finding(Answer.UNKNOWN)}):
        found = report.unexplained([kernel(refused, **probes)])
        assert found == ["6.1: cpu/migrate: refused\nR1 invalid"]


def test_a_count_that_fails_does_not_explain_that_its_program_is_refused() -> None:
    refused = Verified("open/count", error="refused")
    yes = Finding(Answer.YES)
    assert report.unexplained([kernel(refused, ebpf=yes, count=NO)]) == ["6.1: open/count: refused"]
    assert not report.unexplained([kernel(refused, ebpf=NO)])


# ---- tables


def test_each_reason_is_told_once() -> None:
    def cells(own: str) -> list[Cell]:
        shared = "cbpf: it keeps no state"
        return [
            cell("round-robin", EBPF, KERNEL, f"{own}; {shared}"),
            cell("round-robin", CBPF, KERNEL, f"backend = cbpf; {shared}"),
            cell("round-robin", KERNEL, KERNEL, "backend = kernel"),
            cell("flow", CBPF, KERNEL, f"backend = cbpf; {shared}"),
        ]

    said = texts(kernel(*cells("ebpf: 1"), release="5.10"), kernel(*cells("ebpf: 2")))
    assert "asked for  5.10        6.1\n" in said
    assert "ebpf       → kernel ¹  → kernel ²\n" in said
    assert said.count("cbpf       → kernel ³  → kernel ³\n") == 2
    assert "kernel     works       works\n" in said
    assert said.endswith(
        "¹ ebpf: 1; cbpf: it keeps no state\n"
        "² ebpf: 2; cbpf: it keeps no state\n"
        "³ cbpf: it keeps no state"
    )


def test_what_works_with_less_than_there_could_be_has_a_note() -> None:
    noted = Cell("cpu", EBPF, EBPF, works=True, notes=["lost", "not counted"])
    assert "works ¹ ²\n¹ lost\n² not counted" in texts(kernel(noted))


def test_what_does_not_work_says_how() -> None:
    assert "does not work ¹\n¹ no answer" in texts(kernel(Cell("cpu", EBPF, detail="no answer")))


def test_kernels_have_their_versions_and_what_they_lack() -> None:
    said = texts(kernel(release="5.10", migrate=NO), kernel(migrate=Finding(Answer.YES)))
    assert "5.10    Debian 5.10.9-1  8 × some CPU  no ¹\n" in said
    assert "6.1     Debian 6.1.9-1   8 × some CPU  yes\n" in said
    assert said.endswith(f"¹ {WHY}")


def test_verifiers_figures() -> None:
    old = kernel(
        Verified("cpu/plain", 210, 352, 24),
        Verified("cpu/migrate", error="refused: EINVAL"),
        Verified("own/plain", 365, 1724, 32),
        release="5.10",
        migrate=NO,
    )
    new = kernel(
        Verified("cpu/plain", 210, 350, 24),
        Verified("cpu/migrate", 319, 807, 56),
        Verified("own/plain", 360, 1700, 32),
    )
    said = texts(old, new)
    assert "cpu/plain    210           24            352        350\n" in said
    assert "cpu/migrate  319           56            refused ¹  807\n" in said
    assert "own/plain    360–365       32            1724       1700\n" in said
    assert f"¹ {WHY}" in said
    assert "EINVAL" not in said


def test_document() -> None:
    cells = cell("cpu", EBPF, CBPF, "ebpf: no\n|that|")
    text = report.markdown([kernel(cells)], "./dev vm test")
    assert text.startswith("Made by `./dev vm test`.\n\n## Kernels\n\n| kernel | version |")
    assert "| --- | --- | --- |\n| cpu | ebpf | → cbpf ¹ |\n\n¹ ebpf: no \\|that\\|  \n" in text
