"""The benches: their arithmetic, their arguments, and that each runs. Never how fast."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest
from click.testing import CliRunner

from bench import figures, programs
from bench.__main__ import BENCHES, main
from bench.figures import Figure, Section
from steer import abi, report
from steer.bytecode import Code


def test_median_and_middle_half() -> None:
    figure = Figure("cost", "ns", (5.0, 1.0, 3.0, 2.0, 4.0))
    assert (figure.median, figure.quartiles) == (3.0, (2.0, 4.0))
    assert Figure("once", "ns", (7.0,)).quartiles == (7.0, 7.0)


@pytest.mark.parametrize(
    "at_most, at_least, reached",
    [(None, None, None), (2, None, True), (1.9, None, False), (None, 2, True), (None, 3, False)],
)
def test_reached_compares_the_median(
    at_most: float | None, at_least: float | None, reached: bool | None
) -> None:
    assert Figure("cost", "ns", (1.0, 2.0, 9.0), at_most, at_least).reached is reached


def test_ratio_and_difference_are_taken_round_by_round() -> None:
    ours, theirs = (2.0, 30.0), (1.0, 10.0)
    assert figures.ratio("", ours, theirs, 1).values == (2.0, 3.0)
    assert figures.above("", "ns", ours, theirs).values == (1.0, 20.0)


def test_interleaved_goes_there_and_back_and_forgets_the_first_round() -> None:
    calls: list[str] = []

    def take(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = figures.interleaved({"a": lambda: take("a"), "b": lambda: take("b")}, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": (3.0, 6.0), "b": (4.0, 5.0)}


def test_table_shows_spread_and_what_was_wanted() -> None:
    section = Section("start", [Figure("ours", "ms", (9.876, 123.4, 55.55), at_most=60)])
    assert report.plain(section.table()).splitlines() == [
        "start",
        "figure  median  middle half  min   max  unit  wanted",
        "ours    55.5    32.7 – 89.5  9.88  123  ms    ≤ 60    yes",
    ]


def test_counts_are_shown_whole() -> None:
    assert Section("leaks", [Figure("left", "", (0,), 0)]).table().rows[0][1] == "0"


@pytest.mark.parametrize(
    "make", [programs.one_slot, programs.by_hash, programs.in_turn, programs.by_chance]
)
def test_programs_speak_of_their_maps_where_they_load_them(make: Callable[[int], Code]) -> None:
    code = make(4)
    loads = [index for index, insn in enumerate(code.instructions) if insn.startswith("18")]
    assert sorted(code.relocations) == loads
    assert set(code.relocations.values()) <= set(abi.MAPS)


def test_unknown_bench_is_a_usage_error_that_names_those_there_are() -> None:
    done = CliRunner().invoke(main, ["speed"])
    assert done.exit_code == 2
    assert all(name in done.output for name in BENCHES)


def test_help_lists_every_bench() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert all(f"{name} " in done.output for name in BENCHES)


@pytest.mark.needs("root", "netns", "bpf", "bpftool", "gunicorn", "uvicorn")
@pytest.mark.parametrize("name", BENCHES)
def test_bench_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, "--quick", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sections = msgspec.json.decode(done.stdout)["benches"][name]
    assert all(figure["values"] for section in sections for figure in section["figures"])
