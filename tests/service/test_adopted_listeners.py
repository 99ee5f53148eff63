"""`steer run --socket adopt`: servers that open their listeners themselves."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steer.errors import FallbackRefused, WorkersFailed
from testkit import foreign
from testkit.attached import HOST, answers, asking, is_even
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.harness import CPUS, PORT
from testkit.processes import eventually, python
from testkit.programs import path
from testkit.service import Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

AT_LEAST = 200
ADOPT = ("--socket", "adopt", "--bind", f"{HOST}:{PORT}")


def threads(count: int) -> Sequence[str]:
    """The command of a server that has so many listeners; it ends at once on SIGTERM."""
    program = f"import runpy; runpy.run_path({path('listens_in_threads')!r})"
    return ("--", *python(program, HOST, PORT), str(count))


def servers(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.status()["servers"]
    return found


def pids(service: Service) -> list[int]:
    return [each["pid"] for each in servers(service)]


def sockets(service: Service) -> set[int]:
    """The inodes of the listeners."""
    return {inode for each in service.workers() for inode in each["sockets"]}


def selected(service: Service) -> int:
    found: int = service.status()["totals"]["selected"]
    return found


def selects(service: Service, more: int = AT_LEAST) -> None:
    """Wait until it has selected so many more times."""
    begun = selected(service)
    eventually(lambda: selected(service) > begun + more)


# ---- who gets what


def test_listeners_of_one_server_get_their_turns(service: StartService) -> None:
    run = service(*ADOPT, "-w", "4", "--policy", "round-robin", *threads(4))
    run.wait_ready(4)
    assert len(servers(run)) == 1
    assert is_even(answers(200), 4, len(CPUS))
    assert run.status()["policy"] == "round-robin"


def test_listeners_of_several_servers_get_their_turns(service: StartService) -> None:
    run = service(*ADOPT, "--instances", "3", "--policy", "round-robin", *threads(1))
    eventually(lambda: len(run.workers()), 3)
    assert len(set(pids(run))) == 3
    selected_before = run.selected()
    answers(90)
    counts = [now - selected_before[slot] for slot, now in run.selected().items()]
    assert max(counts) - min(counts) <= len(CPUS)


def test_listener_is_drained_and_policy_is_switched(service: StartService) -> None:
    run = service(*ADOPT, "-w", "3", "--policy", "hash", *threads(3))
    run.wait_ready(3)
    assert run.steer("policy", "round-robin").returncode == 0
    assert run.steer("drain", "1").returncode == 0
    assert is_even(answers(60), 2, len(CPUS))
    assert run.steer("undrain", "1").returncode == 0
    assert is_even(answers(60), 3, len(CPUS))


def test_status_names_servers(service: StartService) -> None:
    run = service(*ADOPT, "-w", "2", *threads(2))
    (pid,) = pids(run)
    said = run.steer("status").stdout
    assert f"server 0: ready, pid {pid}, generation 1, up " in said
    assert run.steer("detach", "test").returncode == 1


def test_listeners_of_two_addresses_are_adopted(service: StartService, home: Path) -> None:
    file = foreign.haproxy_file(home, f"{HOST}:{PORT},{HOST}:{PORT + 1}")
    where = (*ADOPT, "--bind", f"{HOST}:{PORT + 1}")
    run = service(*where, "--", "haproxy", "-db", "-f", str(file))
    assert len(run.status()["binds"]) == 2
    eventually(lambda: [each["state"] for each in run.workers()], ["ready"] * 2)
    for port in (PORT, PORT + 1):
        socket.create_connection((HOST, port)).close()
    eventually(lambda: sorted(run.selected().values()), [1, 1])


# ---- servers that end, and reloads


def test_servers_are_added_and_ended(service: StartService) -> None:
    run = service(*ADOPT, "--policy", "round-robin", *threads(1))
    assert run.steer("scale", "3").returncode == 0
    eventually(lambda: [each["state"] for each in run.workers()], ["ready"] * 3)
    assert run.steer("scale", "1").returncode == 0
    eventually(lambda: len(run.workers()), 1)
    assert len(pids(run)) == 1


def test_server_that_is_killed_is_started_again(service: StartService) -> None:
    run = service(*ADOPT, "-w", "2", "--policy", "round-robin", *threads(2))
    (before,), closed = pids(run), sockets(run)
    os.kill(before, signal.SIGKILL)
    eventually(lambda: pids(run) not in ([before], [None]))
    eventually(lambda: len(sockets(run) - closed), 2)
    run.wait_ready(2)
    assert servers(run)[0]["restarts"] == 1
    assert is_even(answers(60), 2, len(CPUS))


def test_reload_starts_another_server_and_loses_nothing(service: StartService, home: Path) -> None:
    file = foreign.haproxy_file(home, f"{HOST}:{PORT}")
    run = service(*ADOPT, "--", "haproxy", "-db", "-f", str(file))
    with asking() as clients:
        for _ in range(3):
            before = pids(run)
            selects(run)
            done = run.steer("reload")
            assert done.returncode == 0, done.stderr
            eventually(lambda before=before: set(pids(run)).isdisjoint(before))
        selects(run)
    assert clients.failed == 0
    assert run.status()["generation"] == 4


@pytest.mark.needs("gunicorn")
def test_reload_puts_another_policy_in_force(service: StartService, home: Path) -> None:
    file = home / "steer.toml"
    (home / "app.py").write_text(foreign.APP)
    where = ("-b", f"{HOST}:{PORT}", "--reuse-port", "--chdir", str(home), "app:app")
    command = [sys.executable, "-m", "gunicorn", "-w", "2", *where]
    table = f'[service]\nsocket = "adopt"\nbind = ["{HOST}:{PORT}"]\ncommand = {command}\n'
    file.write_text(f'{table}policy = "hash"\n')
    run = service("-c", str(file))
    assert run.status()["policy"] == "hash"
    file.write_text(f'{table}policy = "round-robin"\n')
    done = run.steer("reload")
    assert done.returncode == 0, done.stderr
    assert run.status()["policy"] == "round-robin"
    file.write_text(f'{table}policy = "round-robin"\nstrict = true\n')
    assert "strict is False and would be True" in run.steer("reload").stderr
    assert run.status()["generation"] == 2


@pytest.mark.needs("nginx")
def test_workers_that_outlive_their_server_are_ended(service: StartService, home: Path) -> None:
    file = foreign.nginx_file(home, f"{HOST}:{PORT} reuseport")
    run = service(*ADOPT, "-w", "3", "--", "nginx", "-c", str(file))
    run.wait_ready(3)
    (before,) = pids(run)
    left = {each["pid"] for each in run.workers()}
    os.kill(before, signal.SIGKILL)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))
    run.wait_ready(3)
    eventually(lambda: left.isdisjoint(each["pid"] for each in run.workers()))
    assert len(run.workers()) == 3


def test_haproxy_with_a_master_reloads_itself(service: StartService, home: Path) -> None:
    file = foreign.haproxy_file(home, f"{HOST}:{PORT}")
    run = service(*ADOPT, "--", "haproxy", "-W", "-db", "-f", str(file))
    master = pids(run)
    with asking() as clients:
        for _ in range(2):
            selects(run)
            done = run.steer("reload")
            assert done.returncode == 0, done.stderr
        selects(run)
    assert clients.failed == 0
    assert pids(run) == master


def test_server_that_ends_at_once_gets_nothing_more_before(service: StartService) -> None:
    run = service(*ADOPT, "-w", "2", *threads(2))
    with asking() as clients:
        for _ in range(3):
            selects(run)
            assert run.steer("reload").returncode == 0
        selects(run)
    assert clients.failed == 0


def test_reload_that_fails_leaves_the_server(service: StartService, home: Path) -> None:
    file = foreign.haproxy_file(home, f"{HOST}:{PORT}")
    run = service(*ADOPT, "--", "haproxy", "-db", "-f", str(file))
    before = pids(run)
    file.write_text("nonsense")
    done = run.steer("reload")
    assert done.returncode == WorkersFailed.exit_code
    assert "nothing has changed" in done.stderr
    assert pids(run) == before


@pytest.mark.needs("nginx")
def test_nginx_reloads_itself(service: StartService, home: Path) -> None:
    file = foreign.nginx_file(home, f"{HOST}:{PORT} reuseport")
    run = service(*ADOPT, "-w", "3", "--", "nginx", "-c", str(file))
    run.wait_ready(3)
    master = pids(run)
    with asking() as clients:
        for workers in (1, 3):
            text = file.read_text()
            for old in (1, 3):
                text = text.replace(f"_processes {old}", f"_processes {workers}")
            file.write_text(text)
            done = run.steer("reload")
            assert done.returncode == 0, done.stderr
            eventually(lambda count=workers: len(run.workers()) == count)
            selects(run)
    assert clients.failed == 0
    assert pids(run) == master
    assert run.status()["generation"] == 3
    file.write_text("nonsense")
    assert "reload itself by SIGHUP" in reload_in_vain(run)


def reload_in_vain(run: Service) -> str:
    done = run.steer("reload")
    assert done.returncode == WorkersFailed.exit_code
    return done.stderr


@pytest.mark.needs("gunicorn")
def test_gunicorn_reloads_itself_on_hangup(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(foreign.APP)
    where = ("-b", f"{HOST}:{PORT}", "--reuse-port", "--chdir", str(home), "app:app")
    command = (sys.executable, "-m", "gunicorn", "-w", "2", *where)
    run = service(*ADOPT, "-w", "2", "--", *command)
    arbiter = pids(run)
    with asking() as clients:
        before = {each["pid"] for each in run.workers()}
        selects(run)
        run.send_signal(signal.SIGHUP)
        eventually(lambda: run.status()["generation"] == 2)
        eventually(lambda: before.isdisjoint(each["pid"] for each in run.workers()))
        selects(run)
    assert clients.failed == 0
    assert pids(run) == arbiter


@pytest.mark.needs("granian")
def test_granian_is_replaced_at_a_reload(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(foreign.APP)
    options = ("--interface", "wsgi", "--workers", "2", "--host", HOST, "--port", str(PORT))
    where = ("--working-dir", str(home), "app:app")
    command = (sys.executable, "-m", "granian", *options, *where)
    run = service(*ADOPT, "-w", "2", "--policy", "least-conn", "--", *command)
    run.wait_ready(2)
    before = pids(run)
    assert run.steer("reload").returncode == 0
    eventually(lambda: set(pids(run)).isdisjoint(before))
    with asking() as clients:
        selects(run)
    assert clients.failed == 0


def test_controller_that_is_killed_is_followed_by_one_that_steers(service: StartService) -> None:
    options = (*ADOPT, "-w", "2", "--policy", "round-robin", *threads(2))
    run = service(*options)
    before = pids(run)
    run.send_signal(signal.SIGKILL)
    run.wait()
    follower = service(*options)
    assert pids(follower) == before
    follower.wait_ready(2)
    assert is_even(answers(60), 2, len(CPUS))


def test_reexecuted_controller_steers_on(service: StartService) -> None:
    run = service(*ADOPT, "-w", "2", "--policy", "round-robin", *threads(2))
    before = pids(run)
    run.send_signal(signal.SIGUSR2)
    eventually(lambda: "adopted 1 worker" in run.log)
    run.wait_ready(2)
    assert pids(run) == before
    assert is_even(answers(60), 2, len(CPUS))


# ---- what cannot be


def failed(start: StartService, *arguments: str) -> str:
    run = start(*arguments, ready=False)
    assert run.wait() != 0
    return run.log


def test_server_that_listens_elsewhere_is_named(service: StartService) -> None:
    other = ("--socket", "adopt", "--bind", f"{HOST}:{PORT + 1}", "--ready-timeout", "2")
    said = failed(service, *other, *threads(2))
    assert f"it listens on {HOST}:{PORT}, and not on {HOST}:{PORT + 1}" in said
    assert f"give steer --bind {HOST}:{PORT}" in said


def test_server_that_does_not_listen_is_named(service: StartService) -> None:
    said = failed(service, *ADOPT, "--ready-timeout", "1", "--", "sleep", "1000")
    assert f"not ready within 1 s: it does not listen on {HOST}:{PORT}" in said


@pytest.mark.needs("nginx")
def test_listener_without_reuseport_is_refused_with_the_cure(
    service: StartService, home: Path
) -> None:
    file = foreign.nginx_file(home, f"{HOST}:{PORT}")
    said = failed(service, *ADOPT, "--", "nginx", "-c", str(file))
    assert f"adopt the listeners of {HOST}:{PORT}: add a socket: it is without SO_REUSE" in said
    assert "write in its configuration: listen ADDRESS reuseport" in said


def test_fewer_listeners_than_asked_for_are_reported(service: StartService) -> None:
    run = service(*ADOPT, "-w", "4", "--ready-timeout", "4", *threads(2))
    said = f"2 listeners of {HOST}:{PORT} instead of 4, which --workers says"
    eventually(lambda: said in run.log)
    assert said in run.status()["notes"]


def test_what_does_not_fit_is_refused(steer: RunSteer) -> None:
    for options, why in (
        (("--demo",), "there is no command whose listeners could be adopted"),
        (("-b", "udp://:80", "--", "x"), "only listeners of TCP"),
        (("--backend", "cbpf", "--", "x"), "only eBPF steers listeners"),
        (("--socket-option", "keepalive=yes", "--", "x"), "set the option in the server"),
        (("--", "x", "--fd", "{fd}"), "no descriptor for {fd}"),
    ):
        done = steer("run", "--socket", "adopt", *options)
        assert done.returncode == 1
        assert why in done.stderr


@pytest.mark.parametrize("user", [None, NOBODY])
def test_kernels_hash_selects_if_asked_for_or_without_privilege(
    service: StartService, user: int | None
) -> None:
    options = ("--policy", "kernel") if user is None else ()
    run = service(*ADOPT, "-w", "2", *options, *threads(2), user=user)
    status = run.status()
    assert (status["policy"], status["backend"]) == ("kernel", "kernel")
    assert len(status["workers"]) == 2
    assert all(each["pid"] for each in status["workers"])
    assert sum(answers(40).values()) == 40
    if user is not None:
        assert "needs CAP_BPF" in status["backend_reason"]
        assert "listeners are left to the kernel's hash: ebpf: " in run.log
    assert "listeners are left to the kernel's hash" in run.steer("drain", "0").stderr


def test_without_privilege_strict_refuses(service: StartService) -> None:
    run = service(*ADOPT, "--strict", *threads(2), ready=False, user=NOBODY)
    assert run.wait() == FallbackRefused.exit_code
    assert "strict is set" in run.log


def test_check_tells_what_run_would_do(steer: RunSteer) -> None:
    done = steer("check", *ADOPT, "--instances", "2", "--policy", "hash", "--", "sleep", "1")
    assert "2. load hash as ebpf\n" in done.stdout
    assert "4. start 2 servers  (then adopt the listeners that they open)\n" in done.stdout
