"""Our paths are those of pathlib, as far as they go."""

from __future__ import annotations

import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st

from steer.kernel import paths

WRITTEN = st.text("ab./", max_size=12).filter(lambda text: text[:2] != "//")


@given(WRITTEN, WRITTEN)
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_paths_are_those_of_pathlib(first: str, second: str) -> None:
    ours, theirs = paths.Path(first, second), pathlib.Path(first, second)
    assert ours == str(theirs)
    assert [ours.name, ours.stem, ours.suffix] == [theirs.name, theirs.stem, theirs.suffix]
    assert [*ours.parents, ours.parent] == [str(each) for each in (*theirs.parents, theirs.parent)]
    assert paths.Path(first) / second == ours
    assert ours.absolute() == str(theirs.absolute())
    assert paths.Path(ours) == ours == paths.Path(theirs)
