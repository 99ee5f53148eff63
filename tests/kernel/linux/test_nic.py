"""Network cards: real ones in namespaces of the tests' own, made sysfs trees for cards that are
not here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from steer.linux import nic
from testkit import ROOT
from testkit.programs import path


@contextmanager
def away(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a network namespace, and a sysfs, of its own; both go when it ends."""
    mount = 'mount -t sysfs sysfs /sys && exec "$@"'
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-ec", mount, "sh", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- interfaces that are here

LOOK = """
import dataclasses, json
from steer.linux import nic
found = nic.receive_queues()
cpus = {each.name: nic.cpus_taking_packets(each) for each in found}
print(json.dumps([dataclasses.asdict(each) | {"cpus": sorted(cpus[each.name] or ())}
                  for each in found]))
"""
VETH = """
ip link add v0 numrxqueues 4 numtxqueues 4 type veth peer name v1 numrxqueues 2 numtxqueues 2
echo 1 > /sys/class/net/v0/queues/rx-2/rps_cpus
echo 1 > /sys/class/net/v1/queues/rx-0/rps_cpus
echo 1 > /sys/class/net/v1/queues/rx-1/rps_cpus
exec "$@"
"""


def told_away(*argv: str) -> Any:
    with away(*argv) as process:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return json.loads(out)


@pytest.mark.needs("netns")
def test_veth_queues_and_packet_steering() -> None:
    found = told_away("sh", "-ec", VETH, "sh", sys.executable, "-c", LOOK)
    lo, v0, v1 = sorted(found, key=lambda each: str(each["name"]))
    assert (v0["name"], v0["driver"]) == ("v0", None)
    # Linux 5.10 does not tell of a veth's.
    assert (v0["channels"], v1["channels"], lo["channels"]) in ((4, 2, None), (None, None, None))
    assert (v0["rps"], v0["irq_cpus"], v0["cpus"]) == ([[], [], [0], []], [], [])
    assert v0["note"] == "no interrupts of its own: packets stay on the CPU that brought them"
    assert (v1["rps"], v1["cpus"], v1["note"]) == ([[0], [0]], [0], "")
    assert (lo["rps"], lo["cpus"]) == ([[]], [])
    assert lo["note"] == "same-host clients arrive on the CPU they run on"


ARRIVALS = path("arrivals")


@pytest.mark.needs("netns")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")
def test_packets_arrive_where_it_says() -> None:
    client_cpu, steered_cpu, unsteered, steered = told_away(sys.executable, ARRIVALS)
    assert unsteered == [[], client_cpu]
    assert steered == [[steered_cpu], steered_cpu]


def test_the_interfaces_of_this_machine() -> None:
    names = [each.name for each in nic.receive_queues()]
    assert names == [name for _, name in socket.if_nameindex()]
