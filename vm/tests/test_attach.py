"""`steer attach` on this kernel: it keeps what it promises, or says why it cannot."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer import features
from testkit.attached import HOST, Attach, answers, attaching, is_even, threads
from testkit.fixtures import RunSteer
from testkit.harness import CPUS, PORT
from testkit.processes import eventually
from testkit.service import Service

pytestmark = [pytest.mark.needs("root"), pytest.mark.usefixtures("netns")]

LISTENERS, ASKED = 4, 60
RELEASE = os.uname().release
REFUSED = features.MIGRATE.is_newer_than(RELEASE)
attaches = pytest.mark.skipif(
    REFUSED, reason=f"steer attach needs Linux {features.MIGRATE.version}"
)


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


@pytest.fixture
def only_first_is_asked(attach: Attach) -> Iterator[Service]:
    """So that the kernel's hash is told from the policy."""
    with threads(LISTENERS):
        attached = attach("--policy", "round-robin", "--weights", "1000,1,1,1")
        assert answers(ASKED)["0"] > ASKED * 5 / 6
        yield attached


@pytest.mark.skipif(not REFUSED, reason="this kernel can move connections")
def test_kernel_that_moves_no_connections_is_told_of(steer: RunSteer) -> None:
    with threads(LISTENERS):
        done = steer("attach", f"{HOST}:{PORT}")
        assert answers(LISTENERS).total() == LISTENERS
    assert done.returncode == 1
    cure = "use Linux 5.14 or later"
    cause = f"Linux {RELEASE} cannot migrate connections"
    assert done.stderr == f"steer: attach to {HOST}:{PORT}: {cause}; {cure}\n"


@attaches
def test_listeners_get_their_turns(attach: Attach) -> None:
    with threads(LISTENERS):
        attach("--policy", "round-robin")
        assert is_even(answers(ASKED), LISTENERS, len(CPUS))


@attaches
def test_kernel_selects_after_a_detach(only_first_is_asked: Service) -> None:
    assert only_first_is_asked.stop() == 0
    assert answers(ASKED)["0"] < ASKED * 2 / 3


@attaches
def test_kernel_selects_after_the_attacher_was_killed(only_first_is_asked: Service) -> None:
    only_first_is_asked.send_signal(signal.SIGKILL)
    only_first_is_asked.wait()
    eventually(lambda: answers(ASKED)["0"] < ASKED * 2 / 3)
