"""All tests, by three runs of pytest side by side: most wait, for a VM, a server or a timeout.

They take a third of one CPU's time. Each test is in a network namespace of its own, so runs share
no port. What the first run says is seen at once, of the others once all have ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain

from testkit import ROOT

_PYTEST = (sys.executable, "-m", "pytest")


def runs() -> Sequence[Sequence[str]]:
    """What each is given: about as long as each other, where the VM of tests/docs is emulated."""
    services = sorted(str(each.relative_to(ROOT)) for each in ROOT.glob("tests/service/test_*.py"))
    others = ["tests/unit", "tests/docs", "tests/kernel", "tests/tools"]
    return services[::2], services[1::2], others


def main(first: Sequence[str], *others: Sequence[str]) -> int:
    """The exit status of one that failed, or 0."""
    if len(os.sched_getaffinity(0)) == 1:
        return subprocess.run([*_PYTEST, *first, *chain(*others)]).returncode
    with ExitStack() as stack:
        told = [stack.enter_context(tempfile.TemporaryFile()) for _ in others]
        begun = [subprocess.Popen([*_PYTEST, *first])]
        for arguments, output in zip(others, told, strict=True):
            # What failed last is written down by one of them.
            command = [*_PYTEST, "-p", "no:cacheprovider", *arguments]
            begun.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
        # A terminal interrupts all, and they end what they have started.
        signal.signal(signal.SIGINT, lambda *_: None)
        statuses = [each.wait() for each in begun]
        for output in told:
            output.seek(0)
            sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return next(filter(None, statuses), 0)


if __name__ == "__main__":
    raise SystemExit(main(*runs()))
