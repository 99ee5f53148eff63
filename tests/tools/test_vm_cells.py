"""The guest's side of the matrix: it works on this kernel, and notices what does not."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from steer.control.schema import Connections, Service, Totals, Worker
from steer.policy.builtin import EBPF, KERNEL, POLICIES
from testkit import ROOT
from vm import promises, report
from vm.cells import NAMES
from vm.promises import Broken, Clients


@pytest.mark.needs("bpf", "bcc", "netns")
def test_nothing_on_this_kernel_is_unexplained() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vm.cells"], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = report.read(done.stdout.splitlines())
    assert report.unexplained([found]) == []
    assert {name for name, _ in found.cells} == set(NAMES)
    for (name, asked), cell in found.cells.items():
        backends = POLICIES[name].backends if name in POLICIES else (EBPF, KERNEL)
        assert cell.got == (asked if asked in backends else KERNEL)
    programs = {"open/count", *(f"{name}/plain" for name in NAMES if name != KERNEL)}
    assert programs <= found.programs.keys()


# ---- promises that are not kept


def service(workers: int, open_: Sequence[int | None] = ()) -> Service:
    """Worker N is on CPU N."""
    return Service(
        *("cells", 1, "running", 1, "", EBPF, None, 0.0, []),
        [
            Worker(
                *(slot, 1, "ready", 1, [slot], 1, 0, 0.0),
                Connections(open=open_[slot] if open_ else None),
            )
            for slot in range(workers)
        ],
        Totals(),
    )


class Scripted(Clients):
    """Whose connections go to the slots that are told, over and over."""

    def __init__(self, *slots: int, workers: int = 2) -> None:
        super().__init__(lambda: service(workers), [0])
        self._slots = slots

    def ask(self, host: str = "", port: int = 0) -> int:
        self.asked += 1
        return self._slots[(self.asked - 1) % len(self._slots)]


FIRST, SECOND = (0, 1) * 4, (1, 0) * 4


@pytest.mark.parametrize(
    "promise, slots",
    [
        (promises.in_turn, (0, 1, 1, 0)),
        (promises.by_flow, FIRST),
        (promises.by_flow, (*[0] * 20, 1)),
        (promises.by_source, FIRST),
        (promises.to_all, (0, 0, 0, 1)),
    ],
)
def test_kept(promise: Callable[[Clients], str], slots: Sequence[int]) -> None:
    assert promise(Scripted(*slots))


@pytest.mark.parametrize(
    "promise, slots, why",
    [
        (promises.in_turn, (0, 1, 0, 0), "slot 0 3, slot 1 1"),
        (promises.by_flow, FIRST + SECOND, "8 of 8 flows did not go"),
        (promises.by_flow, FIRST + FIRST[:-1] + (0,), "1 of 8 flows did not go"),
        (promises.by_flow, (1,), "all 64 flows to one worker"),
        (promises.by_source, FIRST + SECOND, "8 of 8 addresses did not go"),
        (promises.to_all, (1,), "not to all: slot 1 50"),
    ],
)
def test_broken(promise: Callable[[Clients], str], slots: Sequence[int], why: str) -> None:
    with pytest.raises(Broken, match=why):
        promise(Scripted(*slots))


def test_the_kernels_own_choice_is_by_flow_whatever_was_asked_for() -> None:
    with pytest.raises(Broken, match="flows did not go"):
        promises.check("round-robin", KERNEL, Scripted(*FIRST, *SECOND))
    with pytest.raises(Broken, match="not in turn"):
        promises.check("round-robin", EBPF, Scripted(1))


@pytest.mark.needs("netns")
@pytest.mark.usefixtures("netns")
def test_request_that_is_not_answered_is_named() -> None:
    clients = Clients(lambda: service(1), [0])
    with pytest.raises(Broken, match=r"^request 1, from CPUs \[0.*\]: .*Connection refused"):
        clients.ask()
    with pytest.raises(Broken, match=r"^request 2, .* Connection refused"):
        clients.send(0)
    with (
        socket.create_server((promises.HOST, promises.PORT)) as server,
        ThreadPoolExecutor(1) as threads,
    ):
        answered = threads.submit(answer_nothing, server)
        with pytest.raises(Broken, match=r"^request 3, .* truncated"):
            clients.ask()
        answered.result()


def answer_nothing(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
