"""What the doctor says of this machine."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer import features
from steer.config.service import Service
from steer.doctor import checks
from steer.doctor.checks import CHECKS
from steer.loader import probe
from testkit.capabilities import require
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer
from testkit.namespaces import Netns
from testkit.programs import path
from testkit.service import STEER

SERVICE = Service(bind=("0.0.0.0:8080",), policy="cpu")


def test_a_probe_that_breaks_could_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> features.Finding:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setitem(probe.PROBES, features.CBPF, broken)
    finding = {each.topic: each for each in checks.examine(SERVICE)}["cbpf"]
    assert finding.verdict == "unknown"
    assert finding.found == "could not tell: Too many open files"


@pytest.mark.needs("root", "netns")
def test_without_proc_and_sysfs() -> None:
    bare = 'mount -t tmpfs none /sys && mount -t tmpfs none /proc && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", bare, "sh", STEER, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    found = diagnosis(done)
    assert done.returncode == 1
    assert found["cpus"]["verdict"] == "fail"
    assert found["backend"]["verdict"] == found["somaxconn"]["verdict"] == "unknown"


def test_looking_leaves_nothing_open() -> None:
    checks.examine(SERVICE)
    before = os.listdir("/proc/self/fd")
    checks.examine(SERVICE)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def diagnosis(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """By topic, of several the last."""
    assert result.stderr == ""
    found: list[dict[str, str]] = json.loads(result.stdout)["findings"]
    assert {frozenset(each) for each in found} == {frozenset(("topic", "verdict", "found", "cure"))}
    assert {each["topic"] for each in found} <= set(CHECKS)
    return {each["topic"]: each for each in found}


@pytest.mark.needs("root", "bpf", "migrate")
def test_as_root(steer: RunSteer) -> None:
    result = steer("doctor", "--json", "--bind", ":80")
    found = diagnosis(result)
    assert result.returncode == 0
    for topic in ("privileges", "ebpf", "migration", "cbpf", "ports", "backend"):
        assert found[topic]["verdict"] == "ok"
    assert found["backend"]["found"] == "ebpf"


def test_as_nobody(steer: RunSteer) -> None:
    require("nobody")
    result = steer("doctor", "--json", user=NOBODY)
    found = diagnosis(result)
    assert result.returncode == 0
    assert found["privileges"]["verdict"] == found["ebpf"]["verdict"] == "warn"
    assert "EPERM" in found["ebpf"]["found"]
    assert "CAP_BPF" in found["backend"]["cure"]
    assert found["backend"]["found"].startswith("cbpf; ebpf: ")
    assert found["cbpf"]["verdict"] == found["run-directory"]["verdict"] == "ok"


@pytest.mark.parametrize(
    "options, topic", [(("--strict",), "backend"), (("--bind", ":80"), "ports")]
)
def test_what_would_not_start_fails(steer: RunSteer, options: tuple[str, ...], topic: str) -> None:
    require("nobody")
    result = steer("doctor", "--json", *options, user=NOBODY)
    assert result.returncode == 1
    assert diagnosis(result)[topic]["verdict"] == "fail"


def test_text_on_a_pipe_is_plain(steer: RunSteer) -> None:
    result = steer("doctor")
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["topic", "found", "what", "would", "help"]
    assert {row.split()[0] for row in rows} <= set(CHECKS)
    assert "\033" not in result.stdout


def test_settings_of_this_network_namespace(steer: RunSteer, netns: Netns) -> None:
    netns.sysctl("net.ipv4.tcp_syncookies", 2)
    netns.sysctl("net.core.somaxconn", 100)
    found = diagnosis(steer("doctor", "--json"))
    assert found["syncookies"]["verdict"] == found["somaxconn"]["verdict"] == "warn"
    assert "--backlog 100" in found["somaxconn"]["cure"]


@pytest.mark.needs("root", "netns", "userns")
def test_root_of_a_user_namespace_is_told_why() -> None:
    code = "import json; from steer.doctor import checks as doctor; "
    code += "from steer.config.service import Service; "
    code += "print(json.dumps([e.found for e in doctor.examine(Service())]))"
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    reason = "a user namespace: bpf(2) is refused although CAP_BPF is held"
    assert reason in json.loads(done.stdout)


# A veth pair of which one end is asked: its packets reach the sockets on CPU `FIRST` only. Then
# the cure is carried out, in the words it was given in.
CURED = path("cured_of_idle_workers")


@pytest.mark.needs("root", "netns")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")
def test_the_cure_for_idle_workers_cures() -> None:
    command = ["unshare", "--net", "--mount", sys.executable, CURED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    before, after = json.loads(done.stdout)
    assert [before[0][0], after[0][0]] == ["warn", "ok"]
    assert "get none" in before[0][1]
    assert after[0][1].endswith("every worker gets some")


@pytest.mark.needs("bpf", "nobody")
def test_doctor_and_check_name_the_same_capability(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    """With CAP_BPF alone the verifier refuses a loop over memory that it knows nothing of."""
    caps = "-all,+bpf"
    user = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    drop = (*user, f"--bounding-set={caps}", f"--inh-caps={caps}", f"--ambient-caps={caps}")
    said = {}
    for command in ("check", "doctor"):
        argv = ("setpriv", *drop, "--", STEER, command, "--policy", "least-conn", "--json")
        done = subprocess.run(argv, env=environment, cwd=home, capture_output=True, text=True)
        said[command] = json.loads(done.stdout)
    reason = said["check"]["backend_reason"]
    by_topic = {each["topic"]: each for each in said["doctor"]["findings"]}
    for topic in ("ebpf", "backend"):
        assert by_topic[topic]["verdict"] == "warn"
        assert by_topic[topic]["cure"].startswith("give CAP_PERFMON too: ")
        assert by_topic[topic]["cure"] in reason
