"""`steer inspect` on this kernel: what it sees, or says that it cannot see."""

from __future__ import annotations

import json
import os
import socket
from contextlib import ExitStack
from typing import Any

import pytest

from steer.features import kernel_version
from steer.policy import classic
from steer.sockets import group_program
from testkit.fixtures import RunSteer

pytestmark = [pytest.mark.needs("root"), pytest.mark.usefixtures("netns")]

PORT, MEMBERS = 8080, 3
SEES_PROGRAMS = kernel_version(os.uname().release) >= (5, 10)
COUNTS = kernel_version(os.uname().release) >= (5, 11)
"""bpf_sk_storage_get() in programs on tracepoints."""


def members(stack: ExitStack) -> list[socket.socket]:
    found = []
    for _ in range(MEMBERS):
        sock = stack.enter_context(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", PORT))
        sock.listen(100)
        found.append(sock)
    return found


def inspected(steer: RunSteer, *options: str) -> tuple[dict[str, Any], list[str]]:
    done = steer("inspect", f":{PORT}", "--json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (group,) = found["groups"]
    return group, found["notes"]


def test_a_group_is_seen(steer: RunSteer) -> None:
    with ExitStack() as stack:
        group_program.attach_cbpf(members(stack)[0].fileno(), list(classic.NOTHING))
        group, notes = inspected(steer)
    print(group, notes)
    assert (group["kind"], len(group["sockets"])) == ("reuseport", MEMBERS)
    holders = [each["pid"] for sock in group["sockets"] for each in sock["processes"]]
    assert holders == [os.getpid()] * MEMBERS
    assert group["program_known"] == SEES_PROGRAMS
    if SEES_PROGRAMS:
        assert group["program"]["instructions"] == len(classic.NOTHING)
    else:
        assert any("cannot see BPF programs" in note for note in notes)


def test_connections_are_counted_or_it_is_said_why_not(steer: RunSteer) -> None:
    with ExitStack() as stack:
        members(stack)
        group, notes = inspected(steer, "--for", "100ms")
    print(group, notes)
    accepted = [sock["accepted"] for sock in group["sockets"]]
    if COUNTS:
        assert accepted == [0] * MEMBERS
    else:
        assert accepted == [None] * MEMBERS
        assert any("cannot count: count connections" in note for note in notes)
