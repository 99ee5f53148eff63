"""`--preload`: a template process loads the application once, and forks the workers."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steer.linux import processes
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.processes import (
    DEADLINE_S,
    channel_of,
    descriptors,
    eventually,
    is_running,
    stopped,
)
from testkit.programs import source
from testkit.service import Service

PORT = 8080
APP = source("preloads")
RUN = ("--preload", "app:serve", "-b", f"127.0.0.1:{PORT}", "--policy=random")


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


def ask() -> dict[str, Any]:
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        with sock.makefile("rb") as stream:
            found: dict[str, Any] = json.loads(stream.read())
        return found


def of_all(workers: int) -> dict[int, dict[str, Any]]:
    """What each worker tells, by slot."""
    found: dict[int, dict[str, Any]] = {}

    def is_complete() -> bool:
        told = ask()
        found[told["slot"]] = told
        return len(found) == workers

    eventually(is_complete)
    return found


def template_of(running: Service) -> int:
    """The process ID of its template process, once there is one."""

    def find() -> int:
        found = [pid for pid in processes.children(running.pid) if name(pid) == "steer-template"]
        return found[0] if found else 0

    return eventually(find)


def name(pid: int) -> str | None:
    return processes.command(pid)


def pids(running: Service) -> dict[int, int]:
    return {each["slot"]: each["pid"] for each in running.workers()}


def is_back(running: Service, gone: int) -> bool:
    """Whether all workers are ready, and that process is none of them."""
    states = {each["pid"]: each["state"] for each in running.workers()}
    return gone not in states and set(states.values()) == {"ready"}


def told_without(running: Service, gone: int) -> dict[str, Any]:
    """What a worker tells once another process has taken the place of that one."""
    eventually(lambda: is_back(running, gone))
    return ask()


def loaded(running: Service, times: int) -> None:
    """Wait until a template process has loaded the application so many times in all."""
    eventually(lambda: running.log.count("in template process"), times)


def notes(running: Service) -> str:
    return "\n".join(running.status()["notes"])


# From start to end.


def test_workers_share_one_import(service: StartService) -> None:
    running = service("-w", "3", *RUN)
    template = template_of(running)
    for slot, told in of_all(3).items():
        assert told["imported_by"] == template
        assert told["shared"] == [template, slot], "hooks run once before and once after the fork"
        assert told["parent"] == running.pid
        assert told["environment"]["STEER_SLOT"] == str(slot)
        assert told["environment"]["STEER_WORKER"] == str(told["pid"])
        assert told["fds"] == [3]
    assert notes(running) == ""


def test_template_has_nothing_of_the_controller_or_of_workers(service: StartService) -> None:
    running = service("-w", "2", *RUN)
    template = template_of(running)
    files = descriptors(template)
    assert files.pop(3) == os.devnull, "kept for the socket of a worker"
    others = {fd: files[fd] for fd in files if fd > 2}
    assert list(others.values()) == [channel_of(template)]
    for pid in pids(running).values():
        files = descriptors(pid)
        sockets = sorted(files[fd] for fd in files if fd > 2)
        (worker,) = (each for each in running.workers() if each["pid"] == pid)
        listener = f"socket:[{worker['sockets'][0]}]"
        assert sockets == sorted([listener, channel_of(pid)])


def test_crashed_worker_is_forked_by_the_template(service: StartService) -> None:
    running = service("-w", "1", *RUN)
    before = ask()
    os.kill(before["pid"], signal.SIGKILL)
    after = told_without(running, before["pid"])
    assert after["imported_by"] == before["imported_by"]
    assert "killed by SIGKILL" in running.log
    assert not is_running(before["pid"])


def test_spares_are_forked_by_the_template(service: StartService) -> None:
    running = service("-w", "1", "--spares=1", *RUN)
    template = template_of(running)
    for _ in range(2):
        (spare,) = eventually(lambda: of_state(running, "spare"))
        (worker,) = of_state(running, "ready")
        os.kill(worker, signal.SIGKILL)
        eventually(lambda spare=spare: of_state(running, "ready"), [spare])
        told = ask()
        assert (told["pid"], told["imported_by"]) == (spare, template)


def of_state(running: Service, state: str) -> list[int]:
    return [each["pid"] for each in running.workers() if each["state"] == state]


def test_restarted_and_additional_workers_are_forked_by_the_template(service: StartService) -> None:
    running = service("-w", "1", *RUN)
    template = template_of(running)
    running.ask("restart", slot=0)
    running.ask("scale", workers=3)
    assert {told["imported_by"] for told in of_all(3).values()} == {template}


def test_descriptors_that_the_import_opened_stay_open(service: StartService, home: Path) -> None:
    service("-w", "2", *RUN, "-e", "IMPORT=file")
    told = of_all(2)
    written = (home / "opened-by-import").read_text().split()
    assert {int(each) for each in written} == set(told)


def test_what_the_import_printed_is_printed_once(service: StartService) -> None:
    running = service("-w", "3", *RUN, "-e", "IMPORT=prints")
    assert running.stop() == 0
    assert running.output.count("printed by the import") == 1


def test_nothing_grows_over_many_respawns(service: StartService) -> None:
    running = service("-w", "2", *RUN)
    template = template_of(running)

    def respawn(times: int) -> None:
        for _ in range(times):
            before = pids(running)
            pid = before[min(before)]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: is_back(running, pid))

    def descriptors_of_both() -> int:
        return len(descriptors(template)) + len(descriptors(running.pid))

    respawn(2)
    before = descriptors_of_both()
    respawn(50)
    eventually(lambda: descriptors_of_both() <= before)
    eventually(lambda: len(processes.children(running.pid)), 4)  # template, guard, workers
    assert processes.children(template) == []
    assert template_of(running) == template


# A template process that ends.


def test_killed_template_is_replaced(service: StartService) -> None:
    running = service("-w", "1", *RUN, "-e", "IMPORT=slowly")
    before = ask()
    with stopped(running.pid):  # so that both ends are noticed together
        os.kill(template_of(running), signal.SIGKILL)
        os.kill(before["pid"], signal.SIGKILL)
    meanwhile = told_without(running, before["pid"])
    assert meanwhile["imported_by"] == meanwhile["pid"]
    assert len(meanwhile["shared"]) == 2, "the hooks are called as well"
    assert "no template process: it ended: killed by SIGKILL; new workers load" in running.log
    loaded(running, 2)
    assert notes(running) == ""
    running.ask("restart", slot=meanwhile["slot"])
    assert ask()["imported_by"] == template_of(running) != before["imported_by"]


def test_note_tells_of_a_missing_template(service: StartService) -> None:
    running = service("-w", "1", *RUN, "-e", "IMPORT=slowly")
    os.kill(template_of(running), signal.SIGKILL)
    eventually(lambda: "it ended: killed by SIGKILL; new workers load" in notes(running))
    loaded(running, 2)
    eventually(lambda: notes(running), "")


def test_hung_template_is_killed(service: StartService) -> None:
    running = service("-w", "1", *RUN)
    before, template = ask(), template_of(running)
    os.kill(template, signal.SIGSTOP)
    os.kill(before["pid"], signal.SIGKILL)
    after = told_without(running, before["pid"])
    assert after["imported_by"] == after["pid"]
    assert f"killed template process {template}: timed out" in running.log
    assert not is_running(template)
    loaded(running, 2)


def test_template_that_sends_anything_is_killed(service: StartService) -> None:
    running = service("-w", "1", *RUN, "-e", "IMPORT=garbles", ready=False)
    assert running.wait() == 3
    assert "the template process sent what steer does not understand" in running.log


def test_template_ends_with_controller_and_guard(service: StartService) -> None:
    running = service("-w", "1", *RUN)
    children = processes.children(running.pid)
    template = template_of(running)
    (guard,) = (pid for pid in children if name(pid) == "reuseport-guard")
    os.kill(guard, signal.SIGKILL)
    running.send_signal(signal.SIGKILL)
    running.wait()
    eventually(lambda: any(map(is_running, [template, *children])), False)


def test_process_that_is_no_worker_is_not_taken_for_one(service: StartService) -> None:
    """The application answers in place of steer's code, with a process that it chooses."""
    running = service("-w", "1", *RUN, "-e", "IMPORT=lies")
    children = set(processes.children(running.pid))
    assert "killed template process" in running.log
    assert "is no new worker" in running.log
    assert (told := ask())["imported_by"] == told["pid"], "it was forked by the controller"
    guard = [pid for pid in children if name(pid) == "reuseport-guard"]
    assert all(map(is_running, guard))


# An application that cannot be loaded.


@pytest.mark.parametrize(
    "wish, status, words",
    [
        ("dies", 4, "the template process ended: killed by SIGSEGV"),
        ("preload-fails", 4, "steer_preload: RuntimeError: no model here"),
        ("post-fork-fails", 4, "steer_post_fork: RuntimeError: no database here"),
        ("never", 3, "the template process has not loaded it in 1 s; raise ready_timeout"),
    ],
)
def test_start_fails(service: StartService, wish: str, status: int, words: str) -> None:
    what = (*RUN, "-e", f"IMPORT={wish}", "--ready-timeout=1")
    running = service("-w", "2", *what, ready=False)
    assert running.wait() == status, running.log
    assert running.log.count("steer: load app:serve: ") == 1
    assert words in running.log
    assert "no template process" not in running.log


@pytest.mark.parametrize("more", [(), ("--preload",)])
def test_error_is_the_same_as_without(
    service: StartService, home: Path, more: Sequence[str]
) -> None:
    (home / "app.py").write_text("import missing\n")
    running = service("app:serve", "-w", "2", *more, ready=False)
    assert running.wait() == 4
    assert "steer: load app:serve: ModuleNotFoundError: No module named 'missing'" in running.log
    assert "app.py:1: import missing" in running.log


def test_is_stopped_while_it_loads(service: StartService) -> None:
    running = service("-w", "2", *RUN, "-e", "IMPORT=never", ready=False)
    running.wait_asked()
    assert running.stop() == 0
    assert "ended" in running.log


# A reload.


def test_reload_loads_the_new_code(service: StartService, home: Path) -> None:
    running = service("-w", "2", *RUN)
    old = template_of(running)
    (home / "app.py").write_text(APP.replace("IMPORTED_BY = os.getpid()", "IMPORTED_BY = 'new'"))
    running.ask("reload")
    assert {told["imported_by"] for told in of_all(2).values()} == {"new"}
    assert {told["generation"] for told in of_all(2).values()} == {2}
    assert template_of(running) != old
    eventually(lambda: not is_running(old))


def test_reload_is_refused_if_the_new_code_does_not_load(
    service: StartService, home: Path, steer: RunSteer
) -> None:
    running = service("-w", "2", *RUN)
    old, before = template_of(running), pids(running)
    (home / "app.py").write_text("1 / 0\n")
    done = steer("reload", "test")
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "app.py:1: 1 / 0" in done.stderr
    assert "generation 1 serves on" in done.stderr
    assert pids(running) == before
    assert template_of(running) == old
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: len(set(pids(running).values()) - set(before.values())), 1)
    assert {told["imported_by"] for told in of_all(2).values()} == {old}, "the old code is forked"


def test_reload_begins_and_ends_preloading(service: StartService, home: Path) -> None:
    config = home / "steer.toml"
    text = f'[service]\napp = "app:serve"\nworkers = 1\nbind = ["127.0.0.1:{PORT}"]\n'
    config.write_text(text)
    running = service()
    assert (told := ask())["imported_by"] == told["pid"]
    config.write_text(f"{text}preload = true\n")
    running.ask("reload")
    template = template_of(running)
    assert ask()["imported_by"] == template
    config.write_text(text)
    running.ask("reload")
    assert (told := ask())["imported_by"] == told["pid"]
    eventually(lambda: not is_running(template))


def test_stop_ends_a_reload_that_loads_for_ever(service: StartService, home: Path) -> None:
    running = service("-w", "1", *RUN)
    old = template_of(running)
    (home / "app.py").write_text("import time\ntime.sleep(1000)\n")
    running.send_signal(signal.SIGHUP)
    eventually(lambda: len(set(processes.children(running.pid)) - {old}), 3)
    assert running.stop() == 0
    assert "bug in steer" not in running.log


# What workers must not share.


@pytest.mark.parametrize(
    "source_of_numbers", ["random", "numpy", "ssl", "uuid1", "uuid4", "urandom"]
)
def test_each_worker_has_random_numbers_of_its_own(
    service: StartService, source_of_numbers: str
) -> None:
    service("-w", "4", *RUN, "-e", "IMPORT=numpy uuid")
    found = [told["numbers"][source_of_numbers] for told in of_all(4).values()]
    assert len(set(found)) == 4


def test_threads_and_sockets_of_the_import_are_named(service: StartService) -> None:
    running = service("-w", "2", *RUN, "-e", "IMPORT=thread socket")
    assert "import left threads, which do not run in workers: poller; start" in running.log
    assert "open sockets, which all workers share: on 127.0.0.1:9999 (descriptor" in running.log
    assert {told["threads"] for told in of_all(2).values()} == {1}


def test_no_warning_without_cause(service: StartService) -> None:
    running = service("-w", "2", *RUN, "-e", "IMPORT=numpy")
    assert "import left" not in running.log


@pytest.mark.needs("root")
def test_application_is_imported_as_the_user_of_the_workers(service: StartService) -> None:
    running = service("-w", "2", "-u", str(NOBODY), *RUN)
    for pid in (template_of(running), *pids(running).values()):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = {key: value.split() for key, _, value in (each.partition(":") for each in lines)}
        assert status["Uid"] == [str(NOBODY)] * 4
        assert status["CapEff"] == status["CapPrm"] == status["CapBnd"] == ["0" * 16]
        assert status["NoNewPrivs"] == ["1"]
    assert {told["imported_as"] for told in of_all(2).values()} == {NOBODY}


# Another controller.


def test_next_controller_starts_a_template_of_its_own(service: StartService) -> None:
    first = service("-w", "2", *RUN)
    old, before = template_of(first), pids(first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    eventually(lambda: not is_running(old))
    second = service("-w", "2", *RUN)
    assert pids(second) == before
    loaded(second, 1)
    second.ask("restart", slot=0)
    fresh = eventually(lambda: set(pids(second)) - set(before))
    told = of_all(2)[fresh.pop()]
    assert told["imported_by"] == template_of(second)
    assert told["parent"] == second.pid


def test_reexecuted_controller_starts_a_template_of_its_own(service: StartService) -> None:
    running = service("-w", "2", *RUN)
    old, before = template_of(running), pids(running)
    running.send_signal(signal.SIGUSR2)
    loaded(running, 2)
    assert pids(running) == before
    eventually(lambda: not Path(f"/proc/{old}").exists())
    assert template_of(running) != old
