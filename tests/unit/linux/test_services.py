"""Services that are found by what the kernel lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.linux import title, unix


@pytest.mark.parametrize(
    "line, found",
    [
        ("0: 2 0 10000 1 1 77 /run/a b.sock", [(77, Path("/run/a b.sock"))]),
        ("0: 2 0 10000 1 1 77 @abstract", [(77, Path("@abstract"))]),
        ("0: 2 0 0 1 1 77 /run/not-listening", []),
        ("0: 2 0 10000 1 1 77", []),
        ("", []),
    ],
)
def test_table_of_sockets(tmp_path: Path, line: str, found: list[object]) -> None:
    table = tmp_path / "unix"
    table.write_text(f"Num RefCount Protocol Flags Type St Inode Path\n{line}\n")
    assert list(unix.listening(str(table))) == found


@pytest.mark.parametrize(
    "shown, name, is_it",
    [
        (title.Title("guard", "web"), "web", True),
        (title.Title("guard", "web"), "web2", False),
        (title.Title("guard", "we", is_cut=True), "web", True),
        (title.Title("guard", "web", is_cut=True), "w", False),
    ],
)
def test_name_in_a_title(shown: title.Title, name: str, is_it: bool) -> None:
    assert shown.may_name(name) is is_it
