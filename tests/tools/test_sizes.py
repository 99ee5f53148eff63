"""The files, classes and functions that `./dev check` finds too long."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit import sizes


def block(head: str, lines: int) -> str:
    """A class or function of that many lines."""
    return f"{head}:\n" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    "what, most",
    [("class A", 250), ("def a()", 50), ("async def a()", 50)],
)
def test_class_or_function(tmp_path: Path, what: str, most: int) -> None:
    file = tmp_path / "a.py"
    file.write_text(block(what, most))
    assert list(sizes.too_long(file)) == []
    file.write_text("import os\n" + block(what, most + 1))
    (line,) = sizes.too_long(file)
    assert line.startswith(f"{file}:2: ")
    assert line.endswith(f" {most + 1} lines, {most} at most")


def test_method(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("class A:\n    def a(self):\n" + "        pass\n" * 50)
    assert list(sizes.too_long(file)) == [f"{file}:2: function a: 51 lines, 50 at most"]


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("pass\n" * 400)
    assert list(sizes.too_long(file)) == []
    file.write_text("pass\n" * 401)
    assert list(sizes.too_long(file)) == [f"{file}: 401 lines, 400 at most"]
