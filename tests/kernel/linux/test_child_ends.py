"""However many children end at once, no other signal is lost for it."""

from __future__ import annotations

import subprocess
import sys

from testkit.programs import path


def test_children_that_end_do_not_keep_others_signals_from_being_heard() -> None:
    told = subprocess.run(
        [sys.executable, path("many_children_end")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.stdout == "heard\n", told.stderr
    assert not told.stderr
