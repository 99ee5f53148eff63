"""An attacher that re-executes itself (SIGUSR2), as after an upgrade of steer."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testkit.attached import HOST, Attach, answers, asking, attaching, is_even, threads
from testkit.harness import CPUS, PORT
from testkit.processes import eventually, line_of, running, session
from testkit.programs import path
from testkit.service import Service, wound

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd", "tracing"),
    pytest.mark.usefixtures("netns"),
]

AT_LEAST = 200


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


def reexecuted(attached: Service) -> None:
    """Re-execute it, and wait until its stand-in has ended and the new one answers."""
    times = attached.log.count("attached in")
    attached.send_signal(signal.SIGUSR2)
    eventually(lambda: attached.log.count("attached in") == times + 1)
    eventually(lambda: len(session(attached.pid)) == 2)
    attached.wait_asked()


def totals(attached: Service) -> dict[str, int]:
    found: dict[str, int] = attached.status()["totals"]
    return found


def has_ended(attached: Service) -> bool:
    return not session(attached.pid) and not attached.control_socket.exists()


def test_nothing_is_lost_and_counts_go_on(attach: Attach) -> None:
    with threads(4):
        attached = attach("--policy", "least-conn", "--weights", "1,2,3,4")
        assert attached.steer("policy", "round-robin", "--weights", "4,3,2,1").returncode == 0
        before = 0
        with asking() as clients:
            for _ in range(3):
                eventually(lambda least=before: totals(attached)["selected"] > least + AT_LEAST)
                before = totals(attached)["selected"]
                reexecuted(attached)
                assert totals(attached)["selected"] >= before
        assert (clients.failed, clients.answered > 3 * AT_LEAST) == (0, True)
        assert attached.status()["policy"] == "round-robin"
        assert [each["weight"] for each in attached.workers()] == [4, 3, 2, 1]
        selected = attached.selected()
        assert sum(selected.values()) == totals(attached)["selected"]
        assert attached.stop() == 0
        attached.leaves_nothing()


def test_listeners_keep_their_slots_and_states(attach: Attach) -> None:
    with threads(1):
        attached = attach("--policy", "round-robin")
        with threads(2):
            eventually(lambda: len(attached.workers()) == 3)
            attached.wait_ready(3)
            assert attached.steer("drain", "2").returncode == 0
            before = {each["slot"]: each["sockets"] for each in attached.workers()}
        eventually(lambda: len(attached.workers()) == 1)
        with threads(2):
            attached.wait_ready(3)
            assert attached.steer("drain", "2").returncode == 0
            before = {each["slot"]: each["sockets"] for each in attached.workers()}
            reexecuted(attached)
            found = attached.workers()
            assert {each["slot"]: each["sockets"] for each in found} == before
            assert [each["state"] for each in found] == ["ready", "ready", "draining"]
            assert len(answers(30)) <= 2


def test_stand_in_lets_new_listeners_join(attach: Attach) -> None:
    """While the new attacher starts, or rather hangs, which the stand-in cannot know."""
    with threads(2):
        attached = attach("--policy", "round-robin")
        attached.send_signal(signal.SIGUSR2)
        eventually(lambda: "re-executing" in attached.log)
        os.kill(attached.pid, signal.SIGSTOP)
        try:
            with threads(4):
                eventually(lambda: is_even(answers(60), 4, 2 * len(CPUS) + 20))
        finally:
            os.kill(attached.pid, signal.SIGCONT)
        eventually(lambda: attached.log.count("attached in") == 2)
        assert attached.stop() == 0


def test_server_that_is_down_meanwhile_is_steered_when_it_is_back(attach: Attach) -> None:
    with threads(2):
        attached = attach("--policy", "round-robin")
    eventually(attached.workers, [])
    reexecuted(attached)
    with threads(3):
        attached.wait_ready(3)
        assert is_even(answers(60), 3, len(CPUS))


@contextmanager
def steered_by_its_owner() -> Iterator[None]:
    with running(sys.executable, path("selects_by_its_own"), HOST, str(PORT)) as server:
        assert line_of(server) == "here"
        yield


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_replaced_program_is_put_back_by_the_new_one(attach: Attach, how: int) -> None:
    with steered_by_its_owner():
        attached = attach("--replace", "--policy", "round-robin")
        reexecuted(attached)
        assert is_even(answers(60), 3, len(CPUS))
        attached.stop(how)
        eventually(lambda: has_ended(attached))
        assert answers(40) == {"0": 20, "1": 20}


def test_version_that_does_not_start_changes_nothing(attach: Attach) -> None:
    constant = "steer.attach.stand_in._IMPORTS='raise SystemExit(\"no such module\")'"
    with threads(2):
        attached = attach("--policy", "round-robin", under=wound(constant))
        attached.send_signal(signal.SIGUSR2)
        words = "re-execute: the installed version does not start"
        eventually(lambda: words in attached.log)
        assert "no such module" in attached.log
        assert is_even(answers(60), 2, len(CPUS))
        assert attached.stop() == 0


def test_stand_in_gives_listeners_back_if_the_new_attacher_ends(attach: Attach) -> None:
    constants = ("steer.attach.handover._ASKED=b''", "steer.attach.handover._ANSWER_S=0.1")
    with steered_by_its_owner():
        attached = attach("--replace", "--policy", "round-robin", under=wound(*constants))
        attached.send_signal(signal.SIGUSR2)
        assert attached.wait() == 1
        eventually(lambda: has_ended(attached))
        assert "take the listeners over from the attacher before" in attached.log
        assert "the program that was there before selects again" in attached.log
        assert answers(40) == {"0": 20, "1": 20}


def has_executed(attached: Service) -> bool:
    """Whether it has executed itself: seen before it has its title, unless we get no CPU."""
    shown = Path(f"/proc/{attached.pid}/cmdline").read_bytes()
    return b"attach" in shown or attached.log.count("attached in") == 2


def test_stand_in_gives_listeners_back_if_the_new_attacher_is_killed(attach: Attach) -> None:
    """Before that one has a guard."""
    with steered_by_its_owner():
        attached = attach("--replace", "--policy", "round-robin", name="web")
        attached.send_signal(signal.SIGUSR2)
        eventually(lambda: has_executed(attached))
        attached.send_signal(signal.SIGKILL)
        attached.wait()
        eventually(lambda: has_ended(attached))
        assert "the program that was there before selects again" in attached.log
        assert answers(40) == {"0": 20, "1": 20}
