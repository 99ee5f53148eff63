"""CPUs and NUMA nodes, read from a sysfs of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.errors import KernelError
from steer.linux import topology


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("\n", ()),
        ("0\n", (0,)),
        ("0-3\n", (0, 1, 2, 3)),
        ("0-1,4,8-9\n", (0, 1, 4, 8, 9)),
        ("254-256", (254, 255, 256)),
    ],
)
def test_cpulist(text: str, cpus: tuple[int, ...]) -> None:
    assert topology.parse_cpulist(text) == cpus


@pytest.mark.parametrize("text", ["a", "0-", "0,,1", "-1"])
def test_cpulist_refuses_what_is_not_one(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        topology.parse_cpulist(text)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0\n", ()),
        ("3\n", (0, 1)),
        ("00000000,00000005\n", (0, 2)),
        ("1,00000003", (0, 1, 32)),
        ("80000000,00000000,00000000", (95,)),
        ("f,0", (32, 33, 34, 35)),
    ],
)
def test_cpumask(text: str, cpus: tuple[int, ...]) -> None:
    assert topology.parse_cpumask(text) == cpus


def sysfs(at: Path, possible: str, nodes: dict[int, str]) -> str:
    cpu, node = at / "devices/system/cpu", at / "devices/system/node"
    cpu.mkdir(parents=True)
    (cpu / "possible").write_text(possible)
    for number, cpus in nodes.items():
        (node / f"node{number}").mkdir(parents=True)
        (node / f"node{number}" / "cpulist").write_text(cpus)
    return str(at)


def test_nodes(tmp_path: Path) -> None:
    root = sysfs(tmp_path, "0-3,8-9\n", {0: "0-1,8\n", 1: "2-3\n", 10: "9\n"})
    (tmp_path / "devices/system/node/online").write_text("0-1,10\n")
    found = topology.read(root)
    assert found.possible == (0, 1, 2, 3, 8, 9)
    assert found.node_of == {0: 0, 1: 0, 2: 1, 3: 1, 8: 0, 9: 10}


def test_node_without_cpus_and_cpu_without_node(tmp_path: Path) -> None:
    found = topology.read(sysfs(tmp_path, "0-2\n", {1: "1\n", 2: "\n"}))
    assert found.node_of == {0: 0, 1: 1, 2: 0}


def test_without_numa_all_is_node_0(tmp_path: Path) -> None:
    assert topology.read(sysfs(tmp_path, "0-1\n", {})).node_of == {0: 0, 1: 0}


def test_without_sysfs(tmp_path: Path) -> None:
    with pytest.raises(KernelError) as caught:
        topology.read(str(tmp_path))
    assert str(caught.value) == (
        f"read {tmp_path}/devices/system/cpu/possible: ENOENT; mount sysfs on /sys"
    )
