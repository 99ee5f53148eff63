"""Declarations: parsed exactly, errors name the line, values stay in their range."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import CompileError, ConfigError
from steer.loader import compile
from steer.policy import builtin, declarations
from steer.policy.declarations import Counter, Declared, Histogram, Param

POLICY = "STEER_POLICY(ctx, table)\n{\n\treturn 0;\n}\n"
WHOLE = """/* SPDX-License-Identifier: MIT
 *
 * mine - some by chance, some not.
 *
 * STEER_PARAM(no, 1, 0, 1, "in a comment") and so - not this.
 */
#include "steer.h"

STEER_TABLE(shares)
STEER_PARAM(percent, 10, 0, 100, "of \\"all\\", as " "a number") // STEER_PARAM(nor, 1, 0, 1, "x")
STEER_PARAM(
	mask, 0xffu, 0,
	4294967295U, "bits, with commas (and) parentheses")
STEER_COUNTER(scattered, "by chance")
STEER_COUNTER(kept, "not")
STEER_HISTOGRAM(length, "bytes", "of the packet")
static const char *text = "STEER_COUNTER(none, \\"in a string\\")";

"""


def parse(text: str) -> Declared:
    return declarations.parse(text + POLICY, "read mine.c")


def test_everything_is_read() -> None:
    assert parse(WHOLE) == Declared(
        "some by chance, some not",
        "shares",
        (
            Param("percent", 10, 0, 100, 'of "all", as a number'),
            Param("mask", 255, 0, 4294967295, "bits, with commas (and) parentheses"),
        ),
        (Counter("scattered", "by chance"), Counter("kept", "not")),
        (Histogram("length", "bytes", "of the packet"),),
    )


def test_nothing_has_to_be_declared() -> None:
    assert parse("") == Declared("", "consistent", (), (), ())


@pytest.mark.parametrize(
    "head, summary",
    [
        ("/* mine - does this. */", "does this"),
        ("// mine - does this", "does this"),
        ("/* A licence.\n */\n\n/*\n * my-own - does this - and that\n */", "does this - and that"),
        ("/* nothing of the kind */", ""),
        ("int x; /* mine - too late */", ""),
    ],
)
def test_summary_is_in_the_head_comment(head: str, summary: str) -> None:
    assert parse(f"{head}\n").summary == summary


@pytest.mark.parametrize(
    "line, cause",
    [
        (
            "STEER_TABLE(deck)",
            "no table 'deck'; allowed: consistent, shares, turns, cpus, ring",
        ),
        ("STEER_TABLE()", "'' is not a valid name"),
        ("STEER_TABLE(turns) STEER_TABLE(turns)", "more than 1 STEER_TABLE"),
        ('STEER_PARAM(x, 5, 10, 20, "")', "the default of x, 5, is not from 10 to 20"),
        ('STEER_PARAM(x, 5, 6, 4, "")', "the default of x, 5, is not from 6 to 4"),
        ('STEER_PARAM(x, -1, 0, 4, "")', "'-1' is not a number from 0 to 4294967295"),
        ('STEER_PARAM(x, 1 << 4, 0, 64, "")', "'1<<4' is not a number"),
        ('STEER_PARAM(x, 0, 0, 4294967296, "")', "'4294967296' is not a number"),
        ('STEER_PARAM(x, y, 0, 4, "")', "'y' is not a number"),
        ('STEER_PARAM(x, 1, "")', "is given 3 arguments; write STEER_PARAM(name, default, least"),
        ("STEER_PARAM(x, 1, 0, 2, help)", "'help' is not a string"),
        ("STEER_PARAM(x, 1, 0, 2, )", "'' is not a string"),
        (
            'STEER_PARAM(2x, 1, 0, 2, "")',
            "'2x' is not a valid name; allowed: at most 31 letters, digits and '_'",
        ),
        ('STEER_PARAM("x", 1, 0, 2, "")', "is not a valid name"),
        (f'STEER_COUNTER({"x" * 32}, "")', "is not a valid name"),
        ('STEER_COUNTER(x, "") STEER_COUNTER(x, "")', "STEER_COUNTER(x, ...) is declared twice"),
        ("STEER_COUNTER;", "STEER_COUNTER without (...)"),
        ('STEER_HISTOGRAM(x, "", "") STEER_HISTOGRAM(x, "", "")', "is declared twice"),
    ],
)
def test_errors_name_the_line(line: str, cause: str) -> None:
    with pytest.raises(CompileError) as caught:
        parse(f'#include "steer.h"\n/* two\nlines */ {line}\n')
    assert str(caught.value).startswith("read mine.c: line 3: ")
    assert cause in str(caught.value)


def test_parenthesis_that_is_not_closed() -> None:
    with pytest.raises(CompileError, match="line 1: STEER_COUNTER without its closing parenthesis"):
        declarations.parse("STEER_COUNTER(x, STEER_POLICY", "read mine.c")


@pytest.mark.parametrize("macro, at_most", [("PARAM", 16), ("COUNTER", 16), ("HISTOGRAM", 4)])
def test_each_macro_has_a_limit(macro: str, at_most: int) -> None:
    rest = {"PARAM": '1, 0, 2, ""', "COUNTER": '""', "HISTOGRAM": '"", ""'}[macro]
    lines = [f"STEER_{macro}(x{number}, {rest})\n" for number in range(at_most + 1)]
    assert parse("".join(lines[:-1]))
    with pytest.raises(
        CompileError, match=f"line {at_most + 1}: more than {at_most} STEER_{macro}"
    ):
        parse("".join(lines))


@pytest.mark.parametrize("text", ["", "/* STEER_POLICY(ctx, table) */", '"STEER_POLICY"'])
def test_file_without_a_policy(text: str) -> None:
    with pytest.raises(CompileError, match=r"no STEER_POLICY in it; see `steer policies new`"):
        declarations.parse(text, "read mine.c")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.text() | st.text(alphabet='STEER_PARAM(x,01"/* \n').map("STEER_PARAM({}".format))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(CompileError):
        parse(text)


def test_built_in_policies_declare_the_table_they_have() -> None:
    """So a copy of a built-in policy, as a custom policy, does the same."""
    for each in builtin.POLICIES.values():
        if each.source:
            text = compile.text(compile.sources() / f"{each.source}.c")
            assert declarations.parse(text, each.name).table == each.table, each.name


def test_every_table_can_be_filled() -> None:
    assert set(declarations.TABLES) == set(builtin.LAYOUTS)


# ---- values


SOME = Declared(params=(Param("percent", 10, 0, 100, ""), Param("least", 7, 5, 9, "")))


@pytest.mark.parametrize(
    "given, values",
    [
        ([], (10, 7)),
        (["percent=0"], (0, 7)),
        (["least=9", "percent=100"], (100, 9)),
        (["percent= 5 "], (5, 7)),
    ],
)
def test_values_are_in_the_order_of_the_file(given: list[str], values: tuple[int, ...]) -> None:
    assert declarations.values(SOME, given, "run mine") == values


@pytest.mark.parametrize(
    "given, message",
    [
        (["percent=101"], "parameter percent = '101'; allowed: whole numbers from 0 to 100"),
        (["least=4"], "parameter least = '4'; allowed: whole numbers from 5 to 9"),
        (["percent=-1"], "parameter percent = '-1'; allowed"),
        (["percent=1.5"], "parameter percent = '1.5'; allowed"),
        (["percent="], "parameter percent = ''; allowed"),
        (["percent=ten"], "parameter percent = 'ten'; allowed"),
        (["percent"], "parameter percent = ''; allowed"),
        (["nonsense=1"], "no parameter 'nonsense' (of 'nonsense=1'); allowed: percent, least"),
        (["percent=1", "percent=1"], "parameter percent is given twice; give it once"),
    ],
)
def test_value_that_is_not_allowed(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        declarations.values(SOME, given, "run mine")
    assert str(caught.value).startswith(f"run mine: {message}")


def test_policy_without_parameters_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no parameter 'x' .*; this policy has none"):
        declarations.values(Declared(), ["x=1"], "run mine")


def test_names_are_numbered_in_the_order_of_the_file() -> None:
    assert declarations.defines(parse(WHOLE)) == [
        "-DSTEER_PARAM_percent=0",
        "-DSTEER_PARAM_mask=1",
        "-DSTEER_COUNTER_scattered=0",
        "-DSTEER_COUNTER_kept=1",
        "-DSTEER_HISTOGRAM_length=0",
    ]
