"""The command `inspect`: what it prints, of servers that run by themselves and of steer's own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from testkit import foreign
from testkit.confine import NOBODY, as_user
from testkit.fixtures import RunSteer, StartService
from testkit.foreign import HOST, PORT
from testkit.namespaces import network_namespace
from testkit.processes import AS_IN_DOCKER, eventually, python, running
from testkit.service import STEER

pytestmark = pytest.mark.usefixtures("netns")


def read(steer: RunSteer, *arguments: str, user: int | None = None) -> Any:
    done = steer("inspect", "--json", *arguments, user=user)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def here(found: Mapping[str, Any]) -> list[Any]:
    """The groups of the test's own network namespace."""
    return [each for each in found["groups"] if not each["is_elsewhere"]]


@pytest.mark.needs("tracing")
def test_it_is_as_the_contract_has_it(steer: RunSteer) -> None:
    with foreign.members(2) as pids:
        found = read(steer, f"{HOST}:{PORT}")
    assert found["schema"] == 1
    (group,) = here(found)
    wanted = {"protocol": "tcp", "address": HOST, "port": PORT, "kind": "reuseport", "uid": 0}
    assert group.items() >= {**wanted, "program": None, "program_known": True}.items()
    assert group["netns"] == os.stat("/proc/thread-self/ns/net").st_ino
    assert isinstance(group["decides"], str)
    assert isinstance(group["advice"], list)
    assert {each["processes"][0]["pid"] for each in group["sockets"]} == set(pids)
    for sock in group["sockets"]:
        keys = {"cookie", "inode", "processes", "queued", "backlog", "drops", "accepted"}
        assert sock.keys() >= keys
        assert sock["processes"][0].keys() >= {"pid", "command", "cpus"}
        assert sock["accepted"] is None


@pytest.mark.needs("tracing", "counting")
def test_what_each_accepted_is_counted_until_interrupted(
    steer: RunSteer, environment: dict[str, str]
) -> None:
    command = [STEER, "inspect", f":{PORT}", "--for", "60s", "--json"]
    with (
        foreign.members(3),
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as counting,
    ):
        wchan = Path(f"/proc/{counting.pid}/wchan")
        eventually(lambda: "nanosleep" in wchan.read_text())
        for _ in range(30):
            with socket.create_connection((HOST, PORT)) as client:
                client.recv(1)  # until it is closed, so it was counted
        counting.send_signal(signal.SIGINT)
        assert counting.stdout
        (group,) = here(json.loads(counting.stdout.read()))
    assert counting.returncode == 0
    assert sum(each["accepted"] for each in group["sockets"]) == 30
    assert max(each["accepted"] for each in group["sockets"]) < 30


@pytest.mark.needs("tracing", "counting")
def test_sockets_of_other_network_namespaces_are_counted(steer: RunSteer) -> None:
    with foreign.members(1), network_namespace():
        (group,) = [
            each
            for each in read(steer, f":{PORT}", "--for", "10ms")["groups"]
            if each["is_elsewhere"] and each["kind"] == "single"
        ]
    assert group["sockets"][0]["accepted"] == 0


@pytest.mark.needs("tracing", "counting")
@pytest.mark.parametrize("as_json", [True, False])
def test_datagrams_that_each_received_are_counted_until_interrupted(
    environment: dict[str, str], as_json: bool
) -> None:
    command = [STEER, "inspect", f"udp://:{PORT}", "--for", "60s", *(["--json"] * as_json)]
    with (
        foreign.members(3, kind=socket.SOCK_DGRAM),
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as counting,
    ):
        wchan = Path(f"/proc/{counting.pid}/wchan")
        eventually(lambda: "nanosleep" in wchan.read_text())
        for _ in range(90):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", (HOST, PORT))
        counting.send_signal(signal.SIGINT)
        assert counting.stdout
        said = counting.stdout.read().decode()
    assert counting.returncode == 0
    if not as_json:
        assert re.search(r"\breceived\n", said)
        assert re.search(r" \d+ #{30}\n", said)  # the longest bar
        return
    (group,) = here(json.loads(said))
    received = [each["received"] for each in group["sockets"]]
    assert (sum(received), max(received) < 90) == (90, True)
    assert [each["accepted"] for each in group["sockets"]] == [None] * 3


@pytest.mark.needs("tracing")
def test_it_is_shown_for_people(steer: RunSteer) -> None:
    with foreign.members(2) as pids:
        done = steer("inspect", f"{HOST}:{PORT}", "--for", "10ms")
    assert done.returncode == 0, done.stderr
    assert f"tcp://{HOST}:{PORT}  reuseport  2 sockets  user root" in done.stdout
    assert all(str(pid) in done.stdout for pid in pids)
    assert "decides: the kernel's hash of addresses and ports selects one of 2" in done.stdout


@pytest.mark.needs("bpf", "tracing")
def test_a_service_of_steers_is_named(service: StartService, steer: RunSteer) -> None:
    service("-w", "2", "-b", f"{HOST}:{PORT}", "--policy", "round-robin", name="shop")
    (group,) = here(read(steer, str(PORT)))
    assert group["service"] == "shop"
    assert group["program"]["service"] == "shop"
    assert group["program"]["policy"] == "round-robin"
    assert group["decides"].startswith("policy round-robin of steer's service shop selects one of")
    assert group["advice"] == []


@pytest.mark.needs("bpf", "tracing")
def test_a_service_that_cannot_be_asked_is_named_too(
    service: StartService, steer: RunSteer, environment: dict[str, str], tmp_path: Path
) -> None:
    """As its processes show it."""
    service("-w", "1", "-b", f"{HOST}:{PORT}", "--policy", "hash", name="shop")
    environment["XDG_RUNTIME_DIR"] = environment["STEER_RUNTIME_DIR"] = str(tmp_path)
    (group,) = here(read(steer, str(PORT)))
    assert (group["service"], group["program"]["policy"]) == ("shop", None)
    assert group["decides"].startswith("the policy of steer's service shop selects")


@pytest.mark.needs("nobody")
def test_a_user_without_privilege_is_told_what_is_not_seen(steer: RunSteer) -> None:
    with foreign.members(2):
        found = read(steer, str(PORT), "--for", "10ms", user=NOBODY)
    (group,) = found["groups"]
    assert (group["kind"], group["program_known"], group["uid"]) == ("reuseport", False, 0)
    assert [each["processes"] for each in group["sockets"]] == [[], []]
    assert [each["accepted"] for each in group["sockets"]] == [None, None]
    notes = "\n".join(found["notes"])
    assert "cannot see BPF programs or other network namespaces: " in notes
    assert "needs CAP_BPF: run as root" in notes
    assert "cannot see which processes hold 2 sockets; run as root" in notes
    assert "cannot count without CAP_BPF and CAP_PERFMON; run as root" in notes
    assert "; unless a program is attached" in group["decides"]


@pytest.mark.needs("nobody")
def test_what_hidden_processes_may_share_is_not_called_single(steer: RunSteer) -> None:
    with socket.create_server((HOST, PORT)) as sock:
        done = steer("inspect", user=NOBODY)
        (group,) = read(steer, str(PORT), user=NOBODY)["groups"]
        assert group["kind"] == "unknown"
        assert "which processes wait for it cannot be seen" in group["decides"]
        assert "one socket each, which processes that cannot be seen may share" in done.stdout
        code = "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\ns.accept()"
        command = as_user(NOBODY, *python(code, sock.fileno()))
        with running(*command, fds=[sock.fileno()]) as server:
            eventually(lambda: seen_processes(steer), [server.pid])
            found = read(steer, str(PORT), user=NOBODY)
    assert found["groups"][0]["kind"] == "unknown"
    assert "cannot see whether more processes hold 1 socket; run as root" in found["notes"]


def seen_processes(steer: RunSteer) -> list[int]:
    (group,) = read(steer, str(PORT), user=NOBODY)["groups"]
    return [each["pid"] for each in group["sockets"][0]["processes"]]


@pytest.mark.needs("nobody")
def test_a_user_sees_processes_of_their_own(steer: RunSteer) -> None:
    code = "import signal, socket\ns = socket.create_server(('127.0.0.1', 8080))\ns.accept()"
    with running(*as_user(NOBODY, *python(code))) as server:
        eventually(lambda: steer("inspect", str(PORT), user=NOBODY).returncode == 0)
        (group,) = read(steer, str(PORT), user=NOBODY)["groups"]
    assert [each["pid"] for each in group["sockets"][0]["processes"]] == [server.pid]
    assert (group["uid"], group["user"], group["kind"]) == (NOBODY, "nobody", "single")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nonsense"], "read 'nonsense': malformed; allowed: an address (127.0.0.1:80, "),
        (["127.0.0.1:9"], "inspect 127.0.0.1:9: no socket serves there; `steer inspect` shows"),
        (["[::1]:9"], "inspect [::1]:9: no socket serves there; `steer inspect` shows"),
        (["--netns", "nowhere"], "find network namespace 'nowhere': No such file or directory"),
        (["--for", "soon"], "read --for 'soon': not a time of at most a day; write 5s, 500ms or"),
        (["--for", "0s"], "read --for '0s': not a time"),
        (["4194304"], "no socket serves port 4194304, and there is no such process"),
    ],
)
def test_what_cannot_be_is_told(steer: RunSteer, arguments: list[str], words: str) -> None:
    done = steer("inspect", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_serves_nothing_is_told(steer: RunSteer) -> None:
    with running("sleep", "1000") as process:
        done = steer("inspect", str(process.pid), "--netns", str(os.getpid()))
    words = f"no socket serves port {process.pid}, nor is one open in sleep"
    assert f"inspect {process.pid}: {words}" in done.stderr


@pytest.mark.needs("root")
def test_root_in_a_container_is_told_what_is_not_seen(
    steer: RunSteer, environment: dict[str, str]
) -> None:
    command = [*AS_IN_DOCKER, STEER, "inspect", str(PORT), "--json"]
    with foreign.members(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (group,) = found["groups"]
    assert (group["kind"], group["program_known"]) == ("reuseport", False)
    assert any("needs CAP_BPF" in note for note in found["notes"])
    hold = "cannot see which processes hold 2 sockets; needs CAP_SYS_PTRACE"
    assert (hold in found["notes"]) == (group["sockets"][0]["processes"] == [])


@pytest.mark.needs("root")
def test_root_in_a_container_is_not_told_to_run_as_root(environment: dict[str, str]) -> None:
    with running("sleep", "1000") as process:
        command = [*AS_IN_DOCKER, STEER, "inspect", "--netns", str(process.pid)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs CAP_SYS_" in done.stderr
    assert "run as root" not in done.stderr


@pytest.mark.needs("nobody")
def test_a_network_namespace_that_may_not_be_entered_is_told(steer: RunSteer) -> None:
    done = steer("inspect", "--netns", str(os.getpid()), user=NOBODY)
    assert done.returncode == 1
    assert "run as root" in done.stderr


def test_where_nothing_serves_it_says_so(steer: RunSteer) -> None:
    done = steer("inspect", "--netns", str(os.getpid()))
    assert (done.returncode, done.stdout) == (0, "no socket serves here\n"), done.stderr
    assert read(steer, "--netns", str(os.getpid()))["groups"] == []
