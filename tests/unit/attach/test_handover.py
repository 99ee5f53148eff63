"""What survives the execve(2) of an attacher."""

from __future__ import annotations

import os
import socket

import pytest

from steer.attach import handover
from steer.attach.handover import Handover, Replaced
from steer.attach.replaced import StoredProgram
from steer.config.address import Bind
from steer.config.service import Service
from steer.errors import ControlError

BIND = Bind("tcp", "127.0.0.1", 80)
PROGRAMS = [StoredProgram(7, [{0: 12, 3: 14}, {}]), StoredProgram(classic=bytes(range(256)))]


def test_what_is_passed_on_is_received_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        replaced = [Replaced(BIND, each) for each in PROGRAMS]
        fds = ours.fileno(), theirs.fileno()
        given = Handover(Service(name="web"), [BIND], replaced, "/run/web.sock", True, *fds, 1)
        environment: dict[str, str] = {}
        handover.pass_on(given, environment)
        assert os.get_inheritable(ours.fileno())
        assert handover.received(environment) == given
        assert not os.get_inheritable(ours.fileno())
        assert handover.received(environment) is None


@pytest.mark.parametrize("value", ["", "x", "0", "99999"])
def test_variable_that_names_no_handover_is_ignored(value: str) -> None:
    assert handover.received({"STEER_ATTACH_HANDOVER": value}) is None


def test_handover_of_another_version_is_refused() -> None:
    fd = os.memfd_create("steer-handover")
    os.write(fd, b'{"service": 1}')
    with pytest.raises(ControlError, match="take over from the version before"):
        handover.received({"STEER_ATTACH_HANDOVER": str(fd)})
