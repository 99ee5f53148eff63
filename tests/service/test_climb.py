"""Backends by what a service may do, and back up when it may do more: real capabilities dropped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from steer.errors import Refused
from steer.policy.builtin import CBPF, EBPF, KERNEL, POLICIES
from testkit.clients import BIND, freeze, http_get, request, send
from testkit.confine import NOBODY, setpriv
from testkit.fixtures import StartService
from testkit.harness import CPUS, PORT, pinned
from testkit.processes import AS_IN_DOCKER, eventually
from testkit.service import STEER, Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "nobody"),
    pytest.mark.usefixtures("netns"),
]
HOST = "127.0.0.1"
KEYS = ("policy", "policy_asked", "policy_reason", "backend", "backend_reason")


def slots(number: int, source: str = "") -> Counter[int]:
    """Who answers so many connections; of one address, all taken in by one CPU."""
    with pinned(CPUS[0]):
        return Counter(http_get(HOST, PORT, source=source)[1]["slot"] for _ in range(number))


def is_by_source() -> bool:
    """Whether each client's address has a worker of its own, and not all the same."""
    each = [set(slots(6, f"127.0.3.{host}")) for host in range(1, 17)]
    return all(len(one) == 1 for one in each) and len(set[int]().union(*each)) > 1


def is_by_kernel() -> bool:
    return any(len(set(slots(8, f"127.0.3.{host}"))) > 1 for host in range(1, 5))


def chosen(running: Service) -> tuple[str, str, str]:
    status = running.status()
    return status["policy"], status["policy_asked"], status["backend"]


# ---- what is there at the start

NO_PERFMON = "least-conn: load least-conn: the verifier refuses its loop; give CAP_PERFMON too"
NOT_COUNTED = (
    "open connections cannot be counted: load program steer_open: EPERM;"
    " needs CAP_BPF and CAP_NET_ADMIN"
)
NO_BPF = "ebpf: create BPF map steer_sockets: EPERM; needs CAP_BPF"
HELD = {
    "none": ((), "hash", CBPF, "least-conn needs ebpf", NO_BPF),
    "docker": (None, "hash", CBPF, "least-conn needs ebpf", NO_BPF),
    "bpf": (("bpf",), "hash", EBPF, NO_PERFMON, ""),
    "bpf, net_admin": (("bpf", "net_admin"), "hash", EBPF, NO_PERFMON, ""),
    "bpf, perfmon": (("bpf", "perfmon"), "hash", EBPF, NOT_COUNTED, ""),
    "all three": (
        *(("bpf", "net_admin", "perfmon"), "least-conn", EBPF),
        *("open connections are counted", ""),
    ),
}


@pytest.mark.parametrize("held, policy, backend, why, why_no_better", HELD.values(), ids=HELD)
def test_auto_is_what_the_capabilities_allow(
    service: StartService,
    home: Path,
    environment: dict[str, str],
    held: Sequence[str] | None,
    policy: str,
    backend: str,
    why: str,
    why_no_better: str,
) -> None:
    """It says so, `check` says the same, and it is what chooses."""
    under = AS_IN_DOCKER if held is None else setpriv(*held)
    check = subprocess.run(
        [*under, STEER, "check", *BIND, "--demo", "--json"],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    running = service("-w", "2", *BIND, under=under)
    status = running.status()
    assert chosen(running) == (policy, "auto", backend)
    assert status["policy_reason"].startswith(why)
    assert (status["backend_reason"] or "").startswith(why_no_better)
    assert bool(status["backend_reason"]) is bool(why_no_better)
    found = json.loads(check.stdout)
    assert {key: found[key] for key in KEYS} == {key: status[key] for key in KEYS}
    assert f"policy auto is {policy}, as {why}" in running.log
    assert slots(8).total() == 8
    if backend == EBPF:
        assert sum(running.selected().values()) == status["totals"]["unsteered"] + 8
    if policy == "least-conn":
        with ExitStack() as clients:
            for _ in range(6):
                clients.enter_context(socket.create_connection((HOST, PORT)))
            assert [each["connections"]["open"] for each in running.workers()] == [3, 3]


@pytest.mark.parametrize(
    "policy", [name for name in POLICIES if name not in (KERNEL, "least-conn")]
)
def test_every_policy_but_least_conn_runs_with_cap_bpf_alone(
    home: Path, environment: dict[str, str], policy: str
) -> None:
    binds = (*BIND, "-b", f"udp://{HOST}:{PORT}")
    command = (*setpriv("bpf"), STEER, "check", *binds, "--demo", "--json", "--policy", policy)
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert (found["backend"], found["backend_reason"]) == (EBPF, None)


# ---- up


def test_from_the_kernels_own_hash_to_cbpf(service: StartService) -> None:
    """Started with least-conn, which needs ebpf: any policy that cbpf can is steered."""
    running = service("-w", "3", *BIND, "--policy", "least-conn", user=NOBODY)
    assert chosen(running) == ("least-conn", "least-conn", KERNEL)
    assert (
        "cbpf: classic BPF cannot read the counts of connections"
        in running.status()["backend_reason"]
    )
    assert is_by_kernel()

    done = running.steer("policy", "source")
    assert done.stdout.startswith("changed test: source on cbpf, "), done.stderr
    assert chosen(running) == ("source", "source", CBPF)
    assert running.status()["backend_reason"].startswith(NO_BPF)
    assert is_by_source()

    running.ask("policy", timeout_s=None, policy="auto")
    assert chosen(running) == ("hash", "auto", CBPF)
    assert running.status()["policy_reason"] == "least-conn needs ebpf"
    with pytest.raises(
        Refused, match=r"least-conn would steer nothing: ebpf: [^;]*; needs CAP_BPF"
    ):
        running.ask("policy", timeout_s=None, policy="least-conn")
    assert chosen(running) == ("hash", "auto", CBPF)


def test_there_and_back_as_long_as_no_worker_has_left(service: StartService) -> None:
    running = service("-w", "3", *BIND, "--policy", "source", user=NOBODY)
    for _ in range(2):
        running.ask("policy", timeout_s=None, policy=KERNEL)
        assert is_by_kernel()
        running.ask("scale", timeout_s=None, workers=len(running.workers()) + 1)
        running.ask("policy", timeout_s=None, policy="source")
        assert chosen(running) == ("source", "source", CBPF)
        assert is_by_source()


def test_that_a_worker_has_left_is_why_it_is_refused(service: StartService) -> None:
    running = service("-w", "3", *BIND, "--policy", "least-conn", user=NOBODY)
    os.kill(running.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: running.workers()[0]["restarts"], 1)
    running.wait_ready(3)
    with pytest.raises(Refused) as caught:
        running.ask("policy", timeout_s=None, policy="source")
    assert (
        "take over the sockets there are: classic BPF has to know in which order the kernel has "
        "them, and that is known only as long as no worker has left; stop and start the service; "
        "nothing has changed: least-conn goes on" in str(caught.value)
    )
    assert chosen(running) == ("least-conn", "least-conn", KERNEL)
    assert slots(8).total() == 8


@pytest.mark.parametrize(
    "asked, was, at_first",
    [
        ("auto", "hash", CBPF),
        ("source", "source", CBPF),
        ("least-conn", "least-conn", KERNEL),
        ("round-robin", "round-robin", KERNEL),
    ],
)
def test_to_ebpf_when_there_are_privileges_again(
    service: StartService, asked: str, was: str, at_first: str
) -> None:
    """The controller is killed, and started with more: it adopts what there is as it is, and a
    reload climbs; with the policy it was to have."""
    options = ("-w", "3", *BIND, "--policy", asked)
    first = service(*options, under=AS_IN_DOCKER)
    assert chosen(first) == (was, asked, at_first)
    before = {key: first.status()[key] for key in KEYS}
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = service(*options)
    assert {key: second.status()[key] for key in KEYS} == before
    assert slots(6).total() == 6

    second.ask("reload", timeout_s=None)
    assert chosen(second) == ("least-conn" if asked == "auto" else asked, asked, EBPF)
    assert second.status()["backend_reason"] is None
    second.wait_ready(3)
    count = sum(second.selected().values())
    if asked == "source":
        assert is_by_source()
    else:
        assert slots(9).total() == 9
        assert sum(second.selected().values()) == count + 9


@pytest.mark.parametrize("command", ["reload", "policy"])
def test_a_climb_leaves_out_who_was_left_out(service: StartService, command: str) -> None:
    options = ("-w", "3", *BIND, "--policy", "hash")
    first = service(*options, under=AS_IN_DOCKER)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = service(*options)
    second.ask("drain", slot=1)
    assert 1 not in slots(20)
    more = {"policy": "random"} if command == "policy" else {}
    second.ask(command, timeout_s=None, **more)
    assert chosen(second)[2] == EBPF
    if command == "policy":
        assert 1 not in slots(40)
        assert [each["state"] for each in second.workers()] == ["ready", "draining", "ready"]
        with pytest.raises(Refused, match="worker 1 is draining, and the kernel would select it"):
            second.ask("policy", timeout_s=None, policy=KERNEL)


@pytest.mark.parametrize("policy, to", [(KERNEL, EBPF), ("source", CBPF)])
def test_a_hung_worker_keeps_nobody_from_climbing(
    service: StartService, policy: str, to: str, clients: ExitStack
) -> None:
    """The kernel's own hash goes on choosing it: to leave that is what helps."""
    user = None if to == EBPF else NOBODY
    more = ("--hang", "skip", "--hang-timeout", "0.3")
    started = policy if to == EBPF else "least-conn"
    running = service("-w", "3", *BIND, *more, "--policy", started, user=user)
    worker = running.workers()[1]
    freeze(worker)
    while running.workers()[1]["state"] != "hung":
        clients.enter_context(request())
    running.ask("policy", timeout_s=None, policy="source")
    assert chosen(running)[2] == to
    assert slots(20).total() == 20
    assert is_by_source()
    send(worker, signal.SIGCONT)
    running.wait_ready(3)


# ---- another controller

ASKED = {
    "auto": ("auto", None, ("least-conn", "auto", "open connections are counted")),
    "auto, then by name": ("auto", "hash", ("hash", "hash", None)),
    "by name, then auto": ("hash", "auto", ("least-conn", "auto", "open connections are counted")),
}


def told(running: Service) -> tuple[str, str, str | None]:
    status = running.status()
    return status["policy"], status["policy_asked"], status["policy_reason"]


@pytest.mark.parametrize("started, asked, wanted", ASKED.values(), ids=ASKED)
def test_what_was_asked_for_is_told_on(
    service: StartService, started: str, asked: str | None, wanted: tuple[str, str, str | None]
) -> None:
    """By a controller that executed itself anew, and by one that adopted; a reload puts back what
    is configured."""
    options = ("-w", "2", *BIND, "--policy", started)
    first = service(*options)
    configured = told(first)
    if asked:
        first.ask("policy", timeout_s=None, policy=asked)
    assert told(first) == wanted
    first.send_signal(signal.SIGUSR2)
    eventually(lambda: "adopted 2 workers" in first.log)
    first.wait_ready(2)
    assert told(first) == wanted
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = service(*options)
    assert told(second) == wanted
    assert slots(4).total() == 4
    second.ask("reload", timeout_s=None)
    assert told(second) == configured
    assert f'"policy_asked": "{started}"' in second.steer("status", "--json").stdout


def test_an_adopter_that_may_do_less_leaves_them_to_one_that_may(service: StartService) -> None:
    options = ("-w", "3", *BIND, "--policy", "hash")
    first = service(*options)
    pids = [each["pid"] for each in first.workers()]
    first.send_signal(signal.SIGKILL)
    first.wait()
    less = service(*options, under=AS_IN_DOCKER, ready=False)
    assert less.wait() == 1
    assert "steer: adopt test: its workers are steered by ebpf: create BPF map " in less.log
    assert "; run it with the same privileges, or `steer stop test` first\n" in less.log
    assert slots(20).total() == 20
    second = service(*options)
    assert chosen(second) == ("hash", "hash", EBPF)
    assert [each["pid"] for each in second.workers()] == pids


# ---- changes that fail in the middle


def configure(home: Path, **keys: object) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    (home / "steer.toml").write_text("\n".join(["[service]", *lines]))


FAILS = ["sh", "-c", "exit 7"]
BACK = {
    "within ebpf": ((), "source", EBPF, "round-robin"),
    "from the kernel's own hash to ebpf": ((), "source", EBPF, KERNEL),
    "within cbpf": (AS_IN_DOCKER, "source", CBPF, "random"),
    "from the kernel's own hash to cbpf": (AS_IN_DOCKER, "source", CBPF, KERNEL),
    "from cbpf to the kernel's own hash": (AS_IN_DOCKER, "least-conn", KERNEL, "source"),
}


@pytest.mark.parametrize("under, policy, backend, to", BACK.values(), ids=BACK)
def test_a_reload_that_fails_goes_back(
    service: StartService, home: Path, under: Sequence[str], policy: str, backend: str, to: str
) -> None:
    """The old policy chooses again, on its backend; and it can be tried again."""
    configure(home, policy=policy, workers=3, demo=True)
    running = service(*BIND, under=under)
    before = {key: running.status()[key] for key in (*KEYS, "generation", "notes")}
    pids = [each["pid"] for each in running.workers()]
    for _ in range(2):
        configure(home, policy=to, workers=3, command=FAILS)
        with pytest.raises(Refused, match=r"exit status 7.*nothing has changed"):
            running.ask("reload", timeout_s=None)
        assert {key: running.status()[key] for key in before} == before
        eventually(lambda: [each["pid"] for each in running.workers()], pids)
        assert "again: " not in running.log
        assert is_by_kernel() if backend == KERNEL else is_by_source()
    if backend == EBPF:
        counted = running.selected()
        ((slot, number),) = slots(20, "127.0.3.3").items()
        assert running.selected() == {**counted, slot: counted[slot] + number}
    configure(home, policy=to, workers=3, demo=True)
    running.ask("reload", timeout_s=None)
    assert running.status()["policy"] == to


SERVES = """
import socket
listener = socket.socket(fileno=3)
while True:
    listener.accept()[0].close()
"""
ODD_ONES_SERVE = ["sh", "-c", f"[ $((STEER_SLOT % 2)) = 0 ] && exit 7; exec python3 -c '{SERVES}'"]


@pytest.mark.parametrize("under", [(), AS_IN_DOCKER], ids=[EBPF, CBPF])
def test_a_reload_that_fails_after_some_were_ready_goes_back(
    service: StartService, home: Path, under: Sequence[str]
) -> None:
    """Those that were are still there when the old policy is to choose again, or just end."""
    configure(home, policy="source", workers=3, demo=True)
    running = service(*BIND, under=under)
    before = {key: running.status()[key] for key in (*KEYS, "generation", "notes")}
    pids = [each["pid"] for each in running.workers()]
    for _ in range(3):
        configure(home, policy=KERNEL, workers=3, command=ODD_ONES_SERVE)
        with pytest.raises(Refused, match=r"exit status 7.*nothing has changed"):
            running.ask("reload", timeout_s=None)
        assert {key: running.status()[key] for key in before} == before
        assert "again: " not in running.log
        eventually(lambda: [each["pid"] for each in running.workers()], pids)
        assert is_by_source()


def test_a_reload_that_fails_keeps_the_better_backend(service: StartService, home: Path) -> None:
    """With the policy that there was."""
    configure(home, policy="source", workers=2, demo=True)
    first = service(*BIND, under=AS_IN_DOCKER)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = service(*BIND)
    configure(home, policy="round-robin", workers=2, command=FAILS)
    with pytest.raises(Refused, match="exit status 7"):
        second.ask("reload", timeout_s=None)
    assert chosen(second) == ("source", "source", EBPF)
    assert is_by_source()


SHUTS = """
import socket, time

def serve(worker):
    worker.ready()
    for sock in worker.sockets:
        sock.setblocking(False)
    shut = False
    while not worker.stopping:
        try:
            with worker.sockets[0].accept()[0] as client:
                client.recv(1000)
                client.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n" + b'{"slot": %d}' % worker.slot)
        except OSError:
            time.sleep(0.002)
        if worker.slot == 2 and not shut and os.path.exists("shut"):
            worker.sockets[0].shutdown(socket.SHUT_RD)
            shut = True
            open("is-shut", "w").close()
"""


@pytest.mark.parametrize(
    "policy, under", [("source", AS_IN_DOCKER), (KERNEL, ())], ids=[CBPF, KERNEL]
)
def test_a_climb_that_fails_in_the_middle(
    service: StartService, home: Path, policy: str, under: Sequence[str]
) -> None:
    """The kernel takes the first workers' sockets, and refuses the last one's, which listens no
    more: all goes back to the backend there was."""
    (home / "shuts.py").write_text("import os" + SHUTS)
    options = ("-w", "3", *BIND, "--policy", policy, "--hang-timeout", "0", "shuts:serve")
    running = service(*options, under=under)
    if under:
        running.send_signal(signal.SIGKILL)
        running.wait()
        running = service(*options)
    before = {key: running.status()[key] for key in KEYS}
    (home / "shut").touch()
    eventually((home / "is-shut").exists)
    with pytest.raises(Refused, match="nothing has changed"):
        running.ask("policy", timeout_s=None, policy="round-robin")
    assert {key: running.status()[key] for key in KEYS} == before
    if policy == KERNEL:
        assert set(slots(60)) == {0, 1}


def test_a_reload_that_fails_goes_lower_where_it_cannot_go_back(
    service: StartService, home: Path
) -> None:
    """An old worker ends meanwhile, so in which order the sockets are will not be known again."""
    configure(home, policy="source", workers=3, demo=True)
    running = service(*BIND, under=AS_IN_DOCKER)
    pid = running.workers()[0]["pid"]
    until_gone = f"kill -9 {pid}; while kill -0 {pid}; do :; done 2>/dev/null; exit 7"
    configure(home, policy=KERNEL, workers=3, command=["sh", "-c", until_gone])
    with pytest.raises(Refused, match="exit status 7"):
        running.ask("reload", timeout_s=None)
    assert chosen(running) == ("source", "source", KERNEL)
    why = "that is known only as long as no worker has left"
    assert why in running.status()["backend_reason"]
    assert "source is on kernel, not on cbpf: " in running.log
    running.wait_ready(3)
    assert slots(8).total() == 8
