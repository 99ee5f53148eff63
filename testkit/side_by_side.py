"""All tests, by three runs of pytest side by side: most wait, for a VM, a server or a timeout.

They take a third of one CPU's time. Each test is in a network namespace of its own, so runs share
no port. The output of the first run is seen at once, that of the others once all have ended. The
last line has the outcomes of all, as pytest would say them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

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
    began_s = time.monotonic()
    with ExitStack() as stack:
        reports = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in others]
        begun = [subprocess.Popen(_command(first, reports / "first.xml"))]
        for number, (arguments, output) in enumerate(zip(others, outputs, strict=True)):
            # The cache, which has the tests that failed last, has one writer: the first run.
            command = _command(["-p", "no:cacheprovider", *arguments], reports / f"{number}.xml")
            begun.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
        # A terminal interrupts all, and they end what they have started.
        signal.signal(signal.SIGINT, lambda *_: None)
        statuses = [each.wait() for each in begun]
        for output in outputs:
            output.seek(0)
            sys.stdout.buffer.write(output.read())
        print(closing_line(reports.glob("*.xml"), time.monotonic() - began_s), flush=True)
    return next(filter(None, statuses), 0)


def closing_line(reports: Iterable[Path], took_s: float) -> str:
    """The outcomes of all runs together, from the JUnit reports that they have written."""
    counts = Counter[str]()
    for suite in chain.from_iterable(ElementTree.parse(each).iter("testsuite") for each in reports):
        found = {name: int(suite.get(name, 0)) for name in ("failures", "errors", "skipped")}
        counts.update(found, passed=int(suite.get("tests", 0)) - sum(found.values()))
    names = {"failures": "failed", "passed": "passed", "skipped": "skipped", "errors": "errors"}
    words = ", ".join(f"{counts[key]} {name}" for key, name in names.items() if counts[key])
    return f"===== {words or 'no tests ran'} in {took_s:.2f}s ====="


def _command(arguments: Sequence[str], report: Path) -> Sequence[str]:
    return [*_PYTEST, f"--junitxml={report}", *arguments]


if __name__ == "__main__":
    raise SystemExit(main(*runs()))
