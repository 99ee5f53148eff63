"""Workers are forked with their sockets: nobody waits for them, and nobody is left of those that
nobody knows of."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from steer.child import loading, main
from steer.child.launch import Launch
from steer.config import address
from steer.config.plan import WorkerSpec
from steer.config.service import Service
from steer.errors import BindError, KernelError
from steer.linux import descriptors
from steer.linux import fork as process
from steer.linux.identity import Identity
from steer.sockets import reuseport
from steer.workers import process as worker_process
from steer.workers.process import WorkerProcess
from testkit.clients import http_get
from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source

HERE = f"127.0.0.1:{PORT}"


def launch_on(*binds: str) -> Launch:
    return Launch(
        Service(),
        "test",
        tuple(map(address.parse, binds)),
        WorkerSpec(0, cpu=None, cpus=tuple(os.sched_getaffinity(0)), weight=1),
        slot=0,
        generation=1,
        identity=Identity(),
        notify="@nobody",
        files=(1024, 4096),
    )


class FakeGuard:
    """Knows of workers, but for those whose turn fails."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.known: list[int] = []
        self._fails_at = fails_at

    def put(self, _key: str, _value: bytes, _fds: Sequence[int], pid: int, _signal: int) -> None:
        if len(self.known) == self._fails_at:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.known.append(pid)

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def drop(self, _key: str) -> None:
        pass


@pytest.fixture
def forked() -> Iterator[list[int]]:
    """Processes that are killed at the end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        process.remove_started(pid)


def fork(launch: Launch, guard: FakeGuard) -> WorkerProcess:
    with worker_process.bound(launch) as own:
        by = worker_process.fork_from_nothing
        return worker_process.fork_all([launch], cast(Any, guard), [own], by)[0]


def idle() -> int:
    signal.pause()
    return 0


def open_here() -> int:
    return descriptors.open_descriptors()


@pytest.mark.usefixtures("netns")
def test_start_does_not_wait_for_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never gets to anything is known all the same, with all its sockets."""
    monkeypatch.setattr(main, "main", lambda *_: signal.pause())
    guard = FakeGuard()
    begun = fork(launch_on(HERE, f"udp://{HERE}"), guard)
    try:
        worker_process.begin_all([begun], cast(Any, guard))
        assert guard.known == [begun.pid]
        assert len(begun.bound) == 2
    finally:
        begun.end()


@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize("is_told", [False, True])
def test_worker_that_no_guard_knows_of_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_told: bool
) -> None:
    """Its controller ends before it has told the guard."""

    def load(_service: object) -> Callable[[object], int]:
        (tmp_path / "loaded").touch()
        return lambda _worker: 7

    monkeypatch.setattr(loading, "load", load)
    guard = FakeGuard()
    forked = fork(launch_on(HERE), guard)
    if is_told:
        worker_process.begin_all([forked], cast(Any, guard))
    else:
        forked._channel.socket.shutdown(
            socket.SHUT_RDWR
        )  # as the kernel does with what is nobody's
    assert process.wait_for_end(forked._pidfd, DEADLINE_S)
    assert (tmp_path / "loaded").exists() == is_told
    forked.end()


@pytest.mark.usefixtures("netns")
def test_worker_that_the_guard_cannot_take_leaves_nothing_open() -> None:
    fork(launch_on(HERE), FakeGuard()).end()  # makes the pipe that all children have for a while
    before = open_here()
    guard = FakeGuard(fails_at=0)
    forked = fork(launch_on(HERE), guard)
    with pytest.raises(KernelError, match="Bad file descriptor"):
        worker_process.begin_all([forked], cast(Any, guard))
    forked.end()
    assert open_here() == before


def test_of_several_that_cannot_all_be_forked_none_is_left(
    monkeypatch: pytest.MonkeyPatch, forked: list[int]
) -> None:
    forked.append(process.fork(idle)[0])
    before, there = open_here(), process.started()
    children: list[int] = []
    fork_one = os.fork

    def two_at_most() -> int:
        if len(children) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        children.append(fork_one())
        return children[-1]

    monkeypatch.setattr(os, "fork", two_at_most)
    with pytest.raises(BlockingIOError):
        process.fork_all([idle] * 3)
    assert len(children) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    assert (open_here(), process.started()) == (before, there)


@pytest.mark.usefixtures("netns")
def test_address_that_is_taken_is_told_before_anything_is_forked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "fork_all", lambda *_: pytest.fail("forked"))
    there = f"127.0.0.1:{PORT + 1}"
    with socket.create_server(("127.0.0.1", PORT + 1)):
        before = open_here()
        with pytest.raises(BindError, match=f"bind tcp {there}: EADDRINUSE"):
            fork(launch_on(HERE, there), FakeGuard())
        assert open_here() == before


@pytest.mark.usefixtures("netns")
def test_no_descriptor_left_for_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(reuseport, "member", none_left)
    with pytest.raises(KernelError, match="raise the limit on open files"):
        fork(launch_on(HERE), FakeGuard())


def test_children_are_apart_once_they_have_closed_what_they_inherited(
    monkeypatch: pytest.MonkeyPatch, forked: list[int]
) -> None:
    monkeypatch.setattr(process, "_CLOSED_S", 0.0)
    assert process.await_descriptors_closed() in (True, False)  # of those that were forked before
    with ExitStack() as stack:
        ours, theirs = stack.enter_context(socket.socket()), os.pipe()
        for fd in theirs:
            stack.callback(os.close, fd)

        def child() -> int:
            os.read(theirs[0], 1)
            descriptors.keep_only([])
            signal.pause()
            return 0

        forked.append(process.fork(child)[0])
        assert not process.await_descriptors_closed()
        forked.append(process.fork(child)[0])
        monkeypatch.setattr(process, "_CLOSED_S", 60.0)
        os.write(theirs[1], b"12")
        assert process.await_descriptors_closed()
        assert process.await_descriptors_closed()  # nobody was forked since
        assert ours.fileno() >= 0


@pytest.mark.needs("netns")
@pytest.mark.parametrize("backend", ["kernel", "cbpf"])
def test_sockets_have_low_numbers_however_many_files_are_open(
    service: StartService, home: Path, backend: str
) -> None:
    """select(2) takes none above 1023, and the controller has more of them than that."""
    (home / "app.py").write_text(NUMBERS)
    many = [word for port in range(9_000, 9_400) for word in ("-b", f"udp://127.0.0.1:{port}")]
    binds = ("-b", f"127.0.0.1:{PORT}", *many)
    running = service(*binds, "-w", "3", "--policy", "hash", "--backend", backend, "app:serve")
    found = {tuple(http_get("127.0.0.1", PORT)[1]["numbers"]) for _ in range(20)}
    assert found == {(3, 403, 0)}
    assert running.stop() == 0


NUMBERS = source("random_numbers")


@pytest.mark.needs("netns", "bpf")
@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_worker_that_ends_at_once_is_nobodys_stray(
    service: StartService, home: Path, backend: str
) -> None:
    """Others that were forked meanwhile are not found to have its sockets."""
    (home / "app.py").write_text(ENDS)
    running = service("app:serve", "-w", "6", "--policy", "hash", "--backend", backend, ready=False)
    eventually(lambda: "exit status 7" in running.log)
    (home / "stay").touch()
    running.wait_ready()
    assert "has ended, but" not in running.log
    assert running.stop() == 0


ENDS = """
import os, pathlib

def serve(worker):
    if worker.slot % 2 and not pathlib.Path("stay").exists():
        os._exit(7)
    worker.ready()
    while True:
        worker.sockets[0].accept()[0].close()
"""
