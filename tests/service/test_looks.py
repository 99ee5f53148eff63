"""A look at a worker costs no more than so much, however large the worker makes itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from steer.errors import ControlError, KernelError
from steer.linux import activity, processes, procfs, waiting
from steer.linux.procfs import Files
from steer.linux.waiting import Seen
from testkit.fixtures import StartService
from testkit.processes import eventually
from testkit.programs import source
from testkit.service import Service

FIRST = 7
LISTENER = 100
ASLEEP = "35 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2"
"""nanosleep(2) on x86-64."""
MANY = 5000


class Tree:
    """A made /proc, whose first process is 7."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def process(self, pid: int, syscall: str = ASLEEP, children: str = "", parent: int = 1) -> Path:
        """With one thread, and the listener as descriptor 3."""
        at = self.root / str(pid)
        task = at / "task" / str(pid)
        (task / "fd").mkdir(parents=True)
        (task / "fdinfo").mkdir()
        (task / "fd" / "3").symlink_to(f"socket:[{LISTENER}]")
        (task / "children").write_text(children)
        (task / "syscall").write_text(syscall)
        (task / "status").write_text("voluntary_ctxt_switches:\t1\n")
        (task / "stat").write_text(f"{pid} (a) S {parent} " + "1 " * 48)
        (at / "stat").symlink_to(task / "stat")
        (at / "fd").symlink_to(task / "fd")
        return task


def threads(tree: Tree) -> None:
    task = tree.process(FIRST)
    for tid in range(FIRST + 1, FIRST + MANY):
        (task.parent / str(tid)).symlink_to(task)


def children(tree: Tree) -> None:
    pids = range(FIRST + 1, FIRST + 500)
    tree.process(FIRST, children=" ".join(map(str, pids)))
    for pid in pids:
        tree.process(pid)


def generations(tree: Tree) -> None:
    for pid in range(FIRST, FIRST + 300):
        tree.process(pid, children=str(pid + 1))
    tree.process(FIRST + 300)


def open_files(tree: Tree) -> None:
    """A ring among them that is named by a registered index, so has to be looked for."""
    task = tree.process(FIRST, "426 0x0 0x0 0x1 0x11 0x0 0x0 0x1 0x2")
    for fd in range(4, MANY):
        (task / "fd" / str(fd)).symlink_to("socket:[5]")


def registered(tree: Tree) -> None:
    """With an epoll, and neither is the listener."""
    task = tree.process(FIRST, "232 0x4 0x0 0x0 0x0 0x0 0x0 0x1 0x2")
    (task / "fd" / "4").symlink_to("anon_inode:[eventpoll]")
    line = "tfd:        5 events:       19 data:                5  pos:0 ino:5 sdev:9\n"
    (task / "fdinfo" / "4").write_text(line * MANY)


def selected(tree: Tree) -> None:
    """Every bit of half a gigabyte is set, says the worker."""
    task = tree.process(FIRST, "23 0xffffffff 0x0010 0x0 0x0 0x0 0x0 0x1 0x2")
    with (task / "mem").open("wb") as memory:
        memory.write(b"\xff" * (4 << 20))
        memory.truncate(1 << 30)
    (task / "fd" / "3").unlink()


def polled(tree: Tree) -> None:
    task = tree.process(FIRST, "7 0x10 0x7fffffff 0x0 0x0 0x0 0x0 0x1 0x2")
    (task / "mem").write_bytes(bytes(16) + b"\x09\0\0\0\x01\0\0\0" * (1 << 20))


LARGE = [threads, children, generations, open_files, registered, selected, polled]
LOOKS: list[Callable[[str], object]] = [
    lambda root: waiting.waits_on(FIRST, frozenset({LISTENER}), root, "x86_64"),
    lambda root: waiting.waiters(FIRST, frozenset({LISTENER}), root),
    lambda root: activity.activity(FIRST, root),
    lambda root: activity.is_stopped(FIRST, root),
    lambda root: list(processes.sockets_by_fd(FIRST, root)),
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Files]:
    """Every look that is begun from here on."""
    found: list[Files] = []

    class Recorded(Files):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[arg-type]
            found.append(self)

    for module in (processes, waiting):
        monkeypatch.setattr(module, "Files", Recorded)
    return found


@pytest.mark.parametrize("large", LARGE)
def test_what_a_look_costs(
    tmp_path: Path, made: list[Files], large: Callable[[Tree], None]
) -> None:
    """And what it could not see the end of is unknown, not a no."""
    large(Tree(tmp_path))
    for look in LOOKS:
        look(str(tmp_path))
    assert made
    assert all(files.reads <= 2 * procfs.MOST_READS for files in made)
    assert all(files.bytes_read <= procfs.MOST_BYTES + (1 << 16) for files in made)
    assert LOOKS[0](str(tmp_path)) is Seen.UNKNOWN


def test_all_of_a_large_family_is_found_for_acts(tmp_path: Path) -> None:
    generations(Tree(tmp_path))
    assert len(processes.descendants(FIRST, str(tmp_path))) == 301


def test_for_acts_not_every_thread_is_asked(tmp_path: Path, made: list[Files]) -> None:
    """Each may have children of its own, so with many of them all processes are looked through."""
    tree = Tree(tmp_path)
    threads(tree)
    for pid in (LISTENER, LISTENER + 1):
        tree.process(pid + MANY, parent=FIRST)
    found = processes.descendants(FIRST, str(tmp_path))
    assert (found[0], set(found[1:])) == (FIRST, {LISTENER + MANY, LISTENER + MANY + 1})
    assert sum(files.reads for files in made) <= procfs.MOST_READS


def test_sockets_of_one_with_many_files_are_not_told_in_part(tmp_path: Path) -> None:
    open_files(Tree(tmp_path))
    with pytest.raises(KernelError, match="more than 2048"):
        processes.open_sockets(FIRST, str(tmp_path))


def test_one_that_waits_is_seen_at_once(tmp_path: Path, made: list[Files]) -> None:
    """Its other threads are not looked at."""
    tree = Tree(tmp_path)
    threads(tree)
    (tmp_path / "7/task/7/syscall").write_text("43 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2")
    assert waiting.waits_on(FIRST, frozenset({LISTENER}), str(tmp_path), "x86_64") is Seen.YES
    assert made[0].reads < 300


GREEDY = source("greedy")


@pytest.mark.needs("netns")
def test_a_worker_that_would_keep_us_busy_does_not(service: StartService, home: Path) -> None:
    """It waits with a set of 2^31 descriptors, and has 2,000 threads; others are seen to."""
    (home / "greedy.py").write_text(GREEDY)
    running = service("-w", "2", "--ready-timeout=1000", "greedy:serve", ready=False)
    for restarts in (0, 1):
        eventually(lambda: is_waiting(running))
        worker = greedy(running)
        assert (worker["state"], worker["restarts"]) == ("starting", restarts)
        os.kill(worker["pid"], signal.SIGKILL)
        eventually(lambda: greedy(running)["restarts"] > restarts)  # noqa: B023
    running.send_signal(signal.SIGINT)
    assert running.wait() == 0


def greedy(running: Service) -> dict[str, Any]:
    (found,) = (each for each in running.workers() if each["state"] != "ready")
    return found


def is_waiting(running: Service) -> bool:
    """Whether it is in pselect6(2), with all its threads."""
    with suppress(OSError, ControlError, ValueError):
        pid = greedy(running)["pid"]
        in_call = Path(f"/proc/{pid}/syscall").read_text().startswith("270 0x7fffffff")
        return in_call and len(os.listdir(f"/proc/{pid}/task")) > 2000
    return False
