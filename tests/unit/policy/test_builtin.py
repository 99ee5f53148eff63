"""The list of built-in policies: each row is complete and does what its summary says."""

from __future__ import annotations

from array import array

import pytest

from steer import abi
from steer.loader import find
from steer.policy import builtin, declarations
from steer.policy.builtin import BACKENDS, LAYOUTS, POLICIES, LayoutContext, Policy
from steer.policy.classic import HASH_LENGTH
from steer.policy.cpus import Topology
from steer.policy.layout import Member
from testkit import ROOT

BPF = ROOT / "bpf"
ALL = list(POLICIES.values())
TOPOLOGY = Topology((0, 1, 2, 3), (0, 1, 2, 3), {})
CREW = [Member(4, 1, 0), Member(7, 3, 1), Member(9, 2, 0)]


def test_names() -> None:
    assert list(POLICIES) == [
        "cpu",
        "round-robin",
        "least-conn",
        "hash",
        "source",
        "flow",
        "random",
        "kernel",
    ]
    assert all(name == row.name for name, row in POLICIES.items())


@pytest.mark.parametrize(
    "name, backends",
    [
        ("cpu", ("ebpf", "cbpf", "kernel")),
        ("round-robin", ("ebpf", "kernel")),
        ("least-conn", ("ebpf", "kernel")),
        ("hash", ("ebpf", "cbpf", "kernel")),
        ("source", ("ebpf", "cbpf", "kernel")),
        ("flow", ("ebpf", "kernel")),
        ("random", ("ebpf", "cbpf", "kernel")),
        ("kernel", ("kernel",)),
    ],
)
def test_backends(name: str, backends: tuple[str, ...]) -> None:
    assert POLICIES[name].backends == backends
    assert BACKENDS == ("ebpf", "cbpf", "kernel")


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_a_row_is_complete(row: Policy) -> None:
    assert row.summary
    assert "\n" not in row.summary
    assert row.table in LAYOUTS
    assert not row.is_custom
    assert bool(row.no_cbpf) == (row.source is not None and row.assemble is None)


@pytest.mark.parametrize("row", [row for row in ALL if row.source], ids=lambda row: row.name)
def test_a_row_has_its_file(row: Policy) -> None:
    """The file's head comment starts with its name, and the row says what the file declares."""
    text = (BPF / f"{row.source}.c").read_text()
    assert f" * {row.name} - " in text.split("*/")[0]
    found = find.find(row.name)
    assert found.declared == declarations.parse(text, "read")
    assert found.table == found.declared.table
    assert found.declared.summary


def test_every_file_has_its_row() -> None:
    """Except attach.c, inspect.c and open.c, which select nothing."""
    files = {path.stem for path in BPF.glob("*.c")}
    assert files == {row.source for row in ALL if row.source} | {"attach", "inspect", "open"}


def test_every_table_can_be_declared() -> None:
    assert set(LAYOUTS) == set(declarations.TABLES)
    assert {row.table for row in ALL} == set(LAYOUTS), "each is of use to somebody"


def test_declarations_fit_the_maps() -> None:
    """The maps of abi.PARAMS and abi.OWN have room for all that may be declared."""
    assert declarations.MAX_PARAMS == declarations.MAX_COUNTERS == abi.VALUES
    assert declarations.MAX_HISTOGRAMS == abi.HISTOGRAMS


def test_a_custom_policy_runs_on_ebpf_only() -> None:
    says = declarations.Declared("mine", "ring")
    mine = builtin.custom("mine", "/srv/mine.c", says, "0123")
    assert mine.is_custom
    assert mine.backends == ("ebpf", "kernel")
    assert mine.no_cbpf == "classic BPF cannot run a custom policy"
    assert (mine.summary, mine.table, mine.declared, mine.digest) == ("mine", "ring", says, "0123")
    assert mine != builtin.custom("mine", "/srv/mine.c", says, "4567"), (
        "another text is another policy"
    )


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_a_layout_names_live_slots_only(row: Policy) -> None:
    layout = builtin.build_layout(row, CREW, LayoutContext(TOPOLOGY, HASH_LENGTH))
    chosen = {slot for entry in layout.entries for slot in layout.row(entry)}
    live = {member.slot for member in CREW}
    assert chosen == (live if row.source else {abi.NO_SLOT})
    assert set(layout.fallbacks) == chosen
    assert all(slot < abi.MAX_SLOTS for slot in live)


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_shares_follow_the_weights(row: Policy) -> None:
    """Positions for most, turns for round-robin and for cpu among one CPU's crew; for least-conn
    turns of which each counts for the less, the more there are."""
    layout = builtin.build_layout(row, CREW, LayoutContext(TOPOLOGY, HASH_LENGTH))
    match row.name:
        case "hash" | "source" | "flow":
            drawn, shares = list(layout.entries), {4: 128, 7: 384, 9: 256}
        case "random":
            drawn, shares = list(layout.entries), {4: 1, 7: 3, 9: 2}
        case "least-conn":
            drawn, shares = list(layout.entries[: layout.ring]), {4: 1, 7: 3, 9: 2}
            scale_of = {4: 65535, 7: 21845, 9: 32768}
            words = array("I", layout.turns.tobytes())
            assert [divmod(word, 1 << 16) for word in words] == [
                (scale_of[slot], slot * abi.LOAD_SIZE) for slot in layout.entries
            ]
        case "round-robin":
            drawn, shares = list(layout.row(layout.entries[0])), {4: 1, 7: 3, 9: 2}
        case "cpu":
            drawn, shares = list(layout.row(layout.entries[0])), {4: 1, 9: 2}
        case _:
            drawn, shares = list(layout.entries), {abi.NO_SLOT: abi.ENTRIES}
    assert {slot: drawn.count(slot) for slot in set(drawn)} == shares


@pytest.mark.parametrize("name", ["random", "cpu"])
def test_turns_are_rounded_to_what_a_table_may_hold(name: str) -> None:
    heavy = [Member(slot, 1000 - slot, slot % 2) for slot in range(4)]
    layout = builtin.build_layout(
        POLICIES[name], heavy, LayoutContext(TOPOLOGY, HASH_LENGTH, longest=8)
    )
    if name == "random":
        assert sorted(layout.entries) == [0, 0, 1, 1, 2, 2, 3, 3]
    else:
        assert [sorted(layout.row(entry)) for entry in layout.entries[:2]] == [
            [0, 0, 2, 2],
            [1, 1, 3, 3],
        ]


def test_only_cpu_pins() -> None:
    assert [row.name for row in ALL if row.pinned] == ["cpu"]


@pytest.mark.parametrize("name", ["hash", "source", "flow"])
def test_the_consistent_start_from_the_layout_in_force(name: str) -> None:
    before = builtin.build_layout(POLICIES[name], CREW, LayoutContext(TOPOLOGY, HASH_LENGTH))
    after = builtin.build_layout(
        POLICIES[name], CREW[:2], LayoutContext(TOPOLOGY, HASH_LENGTH, previous=before)
    )
    kept = zip(before.entries, after.entries, strict=True)
    assert all(old == new for old, new in kept if old != 9)
