"""The tables of `steer policies` and `steer policies check`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steer.cli.tables import Table
from steer.loader import cost, find
from steer.loader.verifier import Figures
from steer.policy.builtin import POLICIES, Policy
from steer.policy.declarations import Param
from steer.policy_tools.check import Checked
from steer.values import plural


def described() -> list[dict[str, object]]:
    """The built-in policies, as `steer policies --json` prints them."""
    return [
        {
            "name": each.name,
            "backends": each.backends,
            "summary": each.summary,
            "params": each.declared.params,
        }
        for each in map(find.find, POLICIES)
    ]


def overview() -> list[Table]:
    """The table that `steer policies` prints."""
    rows = [
        (each.name, ", ".join(each.backends), each.summary, _defaults(each))
        for each in map(find.find, POLICIES)
    ]
    return [Table("", ("policy", "backends", "selects", "parameters"), rows)]


def _defaults(found: Policy) -> str:
    return " ".join(f"{param.name}={param.default}" for param in found.declared.params)


def tables(checked: Checked) -> list[Table]:
    """The tables that `steer policies check` prints, without empty ones."""
    found = [
        Table(
            ": ".join(filter(None, (checked.name, checked.summary))), ("", ""), _summary(checked)
        ),
        Table("verifier", _VERIFIER, _figures(checked.programs)),
        Table("parameters", ("name", "default", "allowed", "means"), _params(checked.params)),
        Table("counters", ("name", "counts"), [(one.name, one.help) for one in checked.counters]),
        Table(
            "histograms",
            ("name", "unit", "measures"),
            [(one.name, one.unit, one.help) for one in checked.histograms],
        ),
    ]
    return [table for table in found if table.rows]


_VERIFIER = ("program", "instructions", "processed", "states", "at once", "stack", "time")


def _summary(checked: Checked) -> list[tuple[str, ...]]:
    rows = [("table", checked.table), ("compiled by", checked.compiler)]
    if checked.cost_ns is not None:
        workers = f"{cost.SLOTS} workers, one client, UDP"
        rows.append(
            ("cost of a call", f"{checked.cost_ns:.0f} ns above an empty program, {workers}")
        )
    return [*rows, *(("note", note) for note in checked.notes)]


def _figures(programs: Mapping[str, Figures]) -> list[tuple[str, ...]]:
    return [
        (
            kind,
            str(one.instructions),
            str(one.processed),
            str(one.states_total),
            str(one.states_peak),
            plural(one.stack_bytes, "byte"),
            f"{one.time_us} µs",
        )
        for kind, one in programs.items()
    ]


def _params(params: Sequence[Param]) -> list[tuple[str, ...]]:
    return [(one.name, str(one.default), f"{one.least} to {one.most}", one.help) for one in params]
