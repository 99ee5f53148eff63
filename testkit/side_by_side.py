"""All tests, by two runs of pytest side by side: most tests wait, for a VM, a server or a timeout.

Each test is in a network namespace of its own, so the two share no port. Of the first run all is
seen at once, of the other once both have ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

RUNS = (("tests/service", "tests/unit"), ("tests/docs", "tests/kernel", "tests/tools"))
"""About as long as each other, on a machine that has to emulate the VM of tests/docs."""
_PYTEST = (sys.executable, "-m", "pytest")


def main(first: Sequence[str], other: Sequence[str]) -> int:
    """The exit status of whichever failed."""
    if len(os.sched_getaffinity(0)) == 1:
        return subprocess.run([*_PYTEST, *first, *other]).returncode
    with tempfile.TemporaryFile() as told:
        # What failed last is written down by one of them.
        command = [*_PYTEST, "-p", "no:cacheprovider", *other]
        with (
            subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT) as aside,
            subprocess.Popen([*_PYTEST, *first]) as seen,
        ):
            # A terminal interrupts both, and they end what they have started.
            signal.signal(signal.SIGINT, lambda *_: None)
        told.seek(0)
        sys.stdout.buffer.write(told.read())
        sys.stdout.flush()
    return seen.returncode or aside.returncode


if __name__ == "__main__":
    raise SystemExit(main(*RUNS))
