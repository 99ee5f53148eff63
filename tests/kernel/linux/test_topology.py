"""Which CPUs there are: the kernel's list formats, made sysfs trees, and this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from steer.linux import topology
from testkit import ROOT


def test_this_machine() -> None:
    found = topology.read()
    assert found.allowed == tuple(sorted(os.sched_getaffinity(0)))
    assert set(found.allowed) <= set(found.possible) == set(found.node_of)
    assert len(found.possible) >= (os.cpu_count() or 1)


def test_allowed_is_the_affinity_of_the_asker() -> None:
    one = max(os.sched_getaffinity(0))
    code = "from steer.linux import topology; print(*topology.read().allowed)"
    ran = subprocess.run(
        ["taskset", "-c", str(one), sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == [str(one)]
