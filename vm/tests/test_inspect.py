"""`steer inspect` on this kernel: what it sees, or says that it cannot see."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from steer.features import kernel_version
from steer.policy import classic
from steer.sockets import group_program
from testkit.fixtures import RunSteer
from testkit.processes import eventually
from testkit.service import STEER

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


def inspected(
    steer: RunSteer, *options: str, where: str = f":{PORT}"
) -> tuple[dict[str, Any], list[str]]:
    done = steer("inspect", where, "--json", *options)
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
        assert any("cannot count connections: count connections" in note for note in notes)


def test_datagrams_are_counted_or_it_is_said_why_not(steer: RunSteer) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, ExitStack() as stack:
        sock.bind(("127.0.0.1", PORT))
        command = [STEER, "inspect", f"udp://:{PORT}", "--for", "60s", "--json"]
        counting = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        wchan = Path(f"/proc/{counting.pid}/wchan")
        eventually(lambda: counting.poll() is not None or "nanosleep" in wchan.read_text())
        for _ in range(20):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", ("127.0.0.1", PORT))
        counting.send_signal(signal.SIGINT)
        assert counting.stdout
        found = json.loads(counting.stdout.read())
    (group,) = found["groups"]
    print(group, found["notes"])
    received = group["sockets"][0]["received"]
    if received is None:
        assert any("cannot count datagrams: " in note for note in found["notes"])
        assert not COUNTS
    else:
        assert received == 20
