"""`steer attach`: listeners of servers that run already, steered and let go again."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from steer import abi
from steer.attach import holders
from steer.attach.binds import listeners_at
from steer.attach.target import Target
from steer.config import address
from steer.errors import AttachRefused
from steer.loader import heartbeat
from steer.policy import classic
from steer.sockets import group_program
from testkit.attached import HOST, Attach, answers, ask, attaching, is_even, reset, threads
from testkit.confine import NOBODY, as_user
from testkit.fixtures import RunSteer, StartService
from testkit.harness import CPUS, PORT
from testkit.namespaces import network_namespace
from testkit.processes import eventually, line_of, python, running, session, stopped
from testkit.programs import path
from testkit.service import Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


def late_member() -> tuple[str, ...]:
    """The command of a server that listens, and accepts once it is sent a line."""
    return python(f"import runpy; runpy.run_path({path('listens_before_it_waits')!r})", HOST, PORT)


def states(attached: Service) -> list[str]:
    return [each["state"] for each in attached.workers()]


# ---- who gets what


def test_threads_of_a_program_get_their_turns(attach: Attach) -> None:
    with threads(8):
        attach("--policy", "round-robin")
        assert is_even(answers(400), 8, len(CPUS))


def test_open_connections_are_even_under_least_conn(attach: Attach) -> None:
    with threads(4), ExitStack() as clients:
        attached = attach("--policy", "least-conn")
        for _ in range(18):
            clients.enter_context(ask(hold=True)[1])
        eventually(lambda: sum(opened(attached)), 18)
        counts = opened(attached)
        assert max(counts) - min(counts) <= 1


@pytest.mark.needs("tracing")
def test_connections_that_were_open_before_are_counted(attach: Attach) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(threads(1))
        held = [ask(hold=True)[1] for _ in range(12)]
        attached = attach("--policy", "least-conn")
        assert sum(opened(attached)) == 12
        # Whatever the hash has done with the first, so many make all listeners even.
        more = [ask(hold=True)[1] for _ in range(24)]
        eventually(lambda: opened(attached), [12, 12, 12])
        for each in held:
            reset(each)
        eventually(lambda: sum(opened(attached)), 24)
        for each in more:
            reset(each)
        eventually(lambda: opened(attached), [0, 0, 0])


def opened(attached: Service) -> list[int]:
    """Open connections of each listener."""
    return [each["connections"]["open"] for each in attached.workers()]


def test_listener_serves_the_cpu_that_its_process_is_pinned_to(attach: Attach) -> None:
    """The first time, and after each was pinned to the CPU of another."""
    with ExitStack() as stack:
        pids = [stack.enter_context(threads(1)) for _ in CPUS]
        pinned = pin(pids, reversed(CPUS))
        attached = attach("--policy", "cpu")
        assert cpus(attached) == pinned
        pinned = pin(pids, CPUS)
        eventually(lambda: cpus(attached), pinned)
        assert attached.steer("policy", "hash").returncode == 0
        assert cpus(attached) == {pid: [] for pid in pids}


def pin(pids: Iterable[int], cpus: Iterable[int]) -> dict[int, list[int]]:
    """Pin all threads of each process to a CPU. Returns these."""
    pinned = dict(zip(pids, cpus, strict=True))
    for pid, cpu in pinned.items():
        for tid in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(tid.name), {cpu})
    return {pid: [cpu] for pid, cpu in pinned.items()}


def cpus(attached: Service) -> dict[int, list[int]]:
    return {each["pid"]: each["cpus"] for each in attached.workers()}


def test_drained_listener_gets_nothing_until_undrained(attach: Attach) -> None:
    with threads(3):
        attached = attach("--policy", "round-robin")
        assert attached.steer("drain", "1").returncode == 0
        assert is_even(answers(60), 2, len(CPUS))
        assert attached.steer("undrain", "1").returncode == 0
        assert is_even(answers(60), 3, len(CPUS))


def test_policy_is_switched_while_attached(attach: Attach) -> None:
    with threads(4):
        attached = attach("--policy", "hash")
        assert attached.steer("policy", "round-robin").returncode == 0
        assert is_even(answers(100), 4, len(CPUS))
        assert attached.status()["policy"] == "round-robin"
        assert attached.steer("policy", "kernel").returncode == 1


def test_what_only_steers_own_workers_can_do_is_refused(attach: Attach) -> None:
    with threads(2):
        attached = attach()
        for command in ("reload", "scale 3", "restart 0"):
            done = attached.steer(*command.split())
            assert done.returncode == 1
            assert "its processes are not steer's" in done.stderr


# ---- listeners that come and go


def test_new_listener_gets_nothing_until_it_is_waited_on(attach: Attach) -> None:
    with threads(2):
        attached = attach("--policy", "round-robin")
        with running(*late_member()) as late:
            assert line_of(late) == "here"
            eventually(lambda: states(attached), ["ready", "ready", "starting"])
            assert "late" not in answers(60)
            assert late.stdin
            late.stdin.write("\n")
            late.stdin.flush()
            eventually(lambda: states(attached), ["ready"] * 3)
            assert is_even(answers(60), 3, len(CPUS))
        eventually(lambda: states(attached), ["ready"] * 2)
        for what in ("joined", "ready", "closed"):
            eventually(lambda what=what: f"listener 2 {what}" in attached.log, timeout_s=5)


def test_only_listener_is_selected_though_nobody_waits_on_it(attach: Attach) -> None:
    with running(*late_member()) as late:
        assert line_of(late) == "here"
        with threads(2):
            attached = attach("--policy", "round-robin")
            eventually(lambda: states(attached), ["ready"] * 3)
        eventually(lambda: states(attached), ["ready"])


def test_group_that_was_closed_is_steered_when_it_is_back(attach: Attach) -> None:
    with threads(2):
        attached = attach("--policy", "round-robin")
    eventually(attached.workers, [])
    with threads(4):
        eventually(lambda: states(attached), ["ready"] * 4)
        assert is_even(answers(100), 4, len(CPUS))


def test_any_number_of_listeners_fits_into_the_limit_on_open_files(attach: Attach) -> None:
    with threads(2):
        attached = attach("--policy", "round-robin")
        resource.prlimit(attached.pid, resource.RLIMIT_NOFILE, (64, 64))
        with threads(60):
            eventually(lambda: states(attached), ["ready"] * 62)
            assert len(answers(130)) == 60  # both servers count theirs from 0


def test_status_says_who_answers_if_no_listener_is_selected(attach: Attach) -> None:
    with threads(1):
        attached = attach()
        with threads(1):
            eventually(lambda: states(attached), ["ready"] * 2)
            assert attached.steer("drain", "0").returncode == 0
        eventually(lambda: states(attached), ["draining"])
        assert "the kernel alone decides among 1 listener" in notes(attached)
    eventually(attached.workers, [])
    assert "nobody listens there" in notes(attached)
    with socket.create_server((HOST, PORT)):
        eventually(lambda: "is without SO_REUSEPORT; set" in notes(attached))
        assert "nobody listens there" not in notes(attached)


def notes(attached: Service) -> str:
    return "\n".join(attached.status()["notes"])


# ---- the end


def has_program() -> bool:
    """Whether the group has one, which is asked by taking it away."""
    with socket.socket() as member:
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind((HOST, PORT))
        member.listen()
        try:
            member.setsockopt(socket.SOL_SOCKET, abi.SO_DETACH_REUSEPORT_BPF, 0)
        except FileNotFoundError:
            return False
        return True


@pytest.mark.parametrize("how", ["detach", "stop", "SIGTERM", "SIGINT", "SIGHUP"])
def test_server_is_left_to_the_kernel(attach: Attach, how: str) -> None:
    with threads(2):
        attached = attach("--policy", "round-robin")
        if how.startswith("SIG"):
            attached.stop(signal.Signals[how])
        else:
            assert attached.steer(how).returncode == 0
        assert attached.wait() == 0
        assert not has_program()
        attached.leaves_nothing()
        assert sum(answers(10).values()) == 10


@pytest.mark.parametrize("name", ["SIGTTIN", "SIGTTOU", "SIGWINCH"])
def test_signal_that_is_for_workers_is_ignored(attach: Attach, name: str) -> None:
    with threads(2):
        attached = attach()
        attached.send_signal(signal.Signals[name])
        eventually(lambda: f"{name} is ignored" in attached.log)
        assert states(attached) == ["ready"] * 2
        assert attached.stop() == 0


def test_log_file_is_opened_again(attach: Attach) -> None:
    with threads(2):
        attached = attach()
        log = Path(f"/proc/{attached.pid}/fd/2").readlink()
        log.rename(log.with_suffix(".1"))
        attached.send_signal(signal.SIGUSR1)
        eventually(log.exists)
        assert attached.stop() == 0
        assert "detached" in log.read_text()


@pytest.mark.needs("tracing")
def test_program_that_the_server_attaches_later_is_told_of_and_stays(attach: Attach) -> None:
    with socket.socket() as member:
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind((HOST, PORT))
        member.listen()
        attached = attach()
        group_program.attach_cbpf(member.fileno(), list(classic.NOTHING))
        assert "connections go by that classic program, not by the policy" in notes(attached)
        assert "another program was attached" in attached.log
        assert attached.steer("detach").returncode == 0
        assert attached.wait() == 0
        assert has_program()


@pytest.mark.needs("tracing")
def test_program_that_the_server_detaches_is_told_of_until_it_is_back(attach: Attach) -> None:
    with threads(2):
        attached = attach()
        assert has_program()
        assert "connections go by the kernel's hash" in notes(attached)
        with threads(1):
            eventually(lambda: states(attached), ["ready"] * 3)
            assert "connections go by" not in notes(attached)


def test_detach_takes_an_address(attach: Attach) -> None:
    with threads(2):
        attached = attach()
        assert attached.steer("detach", f"{HOST}:1").returncode == 1
        assert attached.steer("detach", f"{HOST}:{PORT}").returncode == 0
        assert attached.wait() == 0


def test_detach_refuses_what_steer_runs(
    service: StartService, attach: Attach, steer: RunSteer
) -> None:
    run = service("-b", f"{HOST}:{PORT}", "-w", "2", name="own")
    run.wait_ready()
    done = steer("detach", "own")
    assert done.returncode == 1
    assert "`steer stop own` ends it" in done.stderr


def test_kernel_selects_after_attacher_and_guard_were_killed(attach: Attach) -> None:
    with threads(4):
        attached = attach("--policy", "round-robin", "--weights", "1000,1,1,1")
        assert answers(60)["0"] > 50
        killed_with_guard(attached)
        eventually(lambda: answers(60)["0"] < 40)
        assert has_program()


def test_attacher_takes_the_place_of_one_that_was_killed(attach: Attach) -> None:
    with threads(4):
        first = attach("--policy", "round-robin", name="first")
        killed_with_guard(first)
        second = attach("--policy", "round-robin", name="second")
        assert is_even(answers(100), 4, len(CPUS))
        assert states(second) == ["ready"] * 4


def inspected(steer: RunSteer) -> str:
    """What is shown of this network namespace."""
    return steer("inspect", f"{HOST}:{PORT}", "--netns", str(os.getpid())).stdout


def guard_of(attached: Service) -> int:
    (pid,) = (each for each in session(attached.pid) if each != attached.pid)
    return pid


def killed_with_guard(attached: Service) -> None:
    with stopped(attached.pid):  # or it would start another guard
        os.kill(guard_of(attached), signal.SIGKILL)
        attached.send_signal(signal.SIGKILL)
    attached.wait()


@pytest.mark.needs("tracing")
def test_detach_removes_what_a_killed_attacher_left(attach: Attach, steer: RunSteer) -> None:
    with threads(4):
        attached = attach("--policy", "round-robin")
        killed_with_guard(attached)
        by_name = "its attacher was killed; `steer detach ADDR:PORT` removes"
        assert by_name in steer("detach", attached.name).stderr
        done = steer("detach", f"{HOST}:{PORT}")
        assert done.returncode == 0, done.stderr
        assert "its attacher was killed" in done.stdout
        assert not has_program()
        attached.leaves_nothing()
        assert not attached.control_socket.exists()
        assert steer("detach", f"{HOST}:{PORT}").returncode == 1


@pytest.mark.needs("tracing")
def test_nothing_is_taken_over_while_its_heartbeat_is_renewed(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of an attacher in another pid namespace, which seems to have nothing open."""
    monkeypatch.setattr(heartbeat, "silent_s", lambda _number: 0.9)
    with threads(2):
        killed_with_guard(attach())
        with pytest.raises(AttachRefused, match="cannot be seen from here"):
            Target(address.parse(f"{HOST}:{PORT}"))


def test_status_removes_the_socket_of_a_killed_attacher(attach: Attach, steer: RunSteer) -> None:
    with threads(2):
        attached = attach()
        killed_with_guard(attached)
        assert attached.control_socket.exists()
        assert steer("status").stdout == "no service is running\n"
        assert not attached.control_socket.exists()


@pytest.mark.needs("tracing")
def test_what_a_killed_attacher_left_is_inspected(attach: Attach, steer: RunSteer) -> None:
    with threads(4):
        killed_with_guard(attach("--policy", "round-robin"))
        words = "leaves the selection to the hash, as its attacher was killed"
        eventually(lambda: words in inspected(steer))
        found = inspected(steer)
        assert f"`steer detach {HOST}:{PORT}` removes the program that the attacher left" in found


@pytest.mark.needs("tracing")
def test_attacher_that_is_stopped_is_named(attach: Attach, steer: RunSteer) -> None:
    with threads(2):
        attached = attach("--policy", "round-robin")
        attached.send_signal(signal.SIGSTOP)
        try:
            words = f"as its attacher (steer {attached.pid}) has been stopped or hung for"
            eventually(lambda: words in inspected(steer))
            done = steer("detach", f"{HOST}:{PORT}")
            assert done.returncode == 1
            assert f"`kill -CONT {attached.pid}` if it is stopped" in done.stderr
            assert has_program()
        finally:
            attached.send_signal(signal.SIGCONT)


def has_ended(attached: Service) -> bool:
    return not session(attached.pid) and not attached.control_socket.exists()


@pytest.mark.needs("tracing")
def test_guard_leaves_nothing_of_an_attacher_that_was_killed(attach: Attach) -> None:
    with threads(4):
        attached = attach("--policy", "round-robin")
        attached.steer("policy", "hash")
        os.killpg(attached.pid, signal.SIGKILL)
        attached.wait()
        eventually(lambda: has_ended(attached))
        attached.leaves_nothing()
        assert not has_program()
        assert "the attacher is gone: detached from" in attached.log
        assert "the kernel's hash selects" in attached.log


@pytest.mark.needs("tracing")
def test_guard_leaves_the_program_of_somebody_else(attach: Attach) -> None:
    with socket.socket() as member:
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind((HOST, PORT))
        member.listen()
        attached = attach()
        group_program.attach_cbpf(member.fileno(), list(classic.NOTHING))
        attached.send_signal(signal.SIGKILL)
        attached.wait()
        eventually(lambda: has_ended(attached))
        assert "another program was attached, and stays" in attached.log
        assert has_program()


def test_guard_that_was_killed_is_replaced(attach: Attach) -> None:
    with threads(2):
        attached = attach()
        first = guard_of(attached)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: first not in session(attached.pid) and len(session(attached.pid)) == 2)
        second = guard_of(attached)
        attached.send_signal(signal.SIGUSR1)
        eventually(lambda: second not in session(attached.pid) and len(session(attached.pid)) == 2)
        assert attached.stop() == 0
        assert "bug in steer" not in attached.log


def is_refused() -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, PORT)) == errno.ECONNREFUSED


def test_guard_holds_neither_listeners_nor_programs(attach: Attach) -> None:
    with threads(2) as server:
        guard = guard_of(attach())
        os.kill(server, signal.SIGKILL)
        eventually(is_refused)
        held = [os.readlink(each) for each in Path(f"/proc/{guard}/fd").iterdir()]
        assert not [each for each in held if "socket:" in each or "bpf-prog" in each]


# ---- what is refused


def refused(steer: RunSteer, *options: str) -> str:
    done = steer("attach", *(options or (f"{HOST}:{PORT}",)))
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_address_where_nobody_listens_is_refused(steer: RunSteer) -> None:
    assert "nobody listens there" in refused(steer)
    with threads(2):
        said = refused(steer, f":{PORT}")
    assert f"attach to :{PORT}: nobody listens at exactly that address" in said
    assert f"but at {HOST}:{PORT}; `steer attach {HOST}:{PORT}`" in said


def test_address_that_a_wildcard_serves_names_the_wildcard(steer: RunSteer) -> None:
    with socket.create_server(("", PORT), reuse_port=True):
        said = refused(steer, f"{HOST}:{PORT}")
    assert "nobody listens at exactly that address, but at 0.0.0.0" in said
    assert f"`steer attach 0.0.0.0:{PORT}`" in said


def test_user_without_privilege_is_not_told_of_strict(steer: RunSteer) -> None:
    code = (
        "import signal, socket\n"
        f"s = socket.create_server(({HOST!r}, {PORT}), reuse_port=True)\n"
        "print('here', flush=True)\ns.accept()"
    )
    with running(*as_user(NOBODY, *python(code))) as server:
        assert line_of(server) == "here"
        done = steer("attach", f"{HOST}:{PORT}", user=NOBODY)
    assert done.returncode == 1
    cause = "only eBPF steers listeners of other programs, and ebpf: "
    assert f"attach to {HOST}:{PORT}: {cause}" in done.stderr
    assert "run as root" in done.stderr
    assert "strict" not in done.stderr


def test_shared_socket_is_refused(steer: RunSteer) -> None:
    code = "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\ns.accept()"
    with socket.create_server((HOST, PORT)) as sock, ExitStack() as processes:
        for _ in range(3):
            command = python(code, sock.fileno())
            processes.enter_context(running(*command, fds=[sock.fileno()]))
        assert "`steer inspect 127.0.0.1:8080` says how" in refused(steer)


def test_one_socket_that_several_wait_on_is_refused(steer: RunSteer) -> None:
    with socket.socket() as sock, ExitStack() as processes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((HOST, PORT))
        sock.listen()
        code = "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\ns.accept()"
        for _ in range(3):
            command = python(code, sock.fileno())
            processes.enter_context(running(*command, fds=[sock.fileno()]))
        eventually(lambda: "it is one socket, and 3 processes wait on it" in refused(steer))


def test_service_of_steers_own_is_refused(service: StartService, steer: RunSteer) -> None:
    run = service("-b", f"{HOST}:{PORT}", "-w", "2", name="own")
    run.wait_ready()
    assert "it is service own of steer's" in refused(steer)


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("command", [(), ("env", "-i")], ids=["", "environment is overwritten"])
def test_service_whose_controller_is_another_users_is_named(
    service: StartService, steer: RunSteer, command: tuple[str, ...]
) -> None:
    code = "import socket, sys\nsocket.socket(fileno=int(sys.argv[1])).accept()"
    worker = (*command, *python(code), "{fd}")
    run = service(
        *("-b", f"{HOST}:{PORT}", "-w", "2", "--user", "nobody", "--", *worker), name="own"
    )
    run.wait_ready()
    done = steer("attach", f"{HOST}:{PORT}", user=NOBODY)
    assert f"attach to {HOST}:{PORT}: it is service own of steer's" in done.stderr


def test_second_attacher_is_refused(attach: Attach, steer: RunSteer) -> None:
    with threads(2):
        first = attach(name="first")
        said = refused(steer)
        assert "service first steers it already" in said
        assert f"`kill -USR2 {first.pid}` after an upgrade of steer" in said


def test_other_users_listeners_are_refused(steer: RunSteer) -> None:
    with threads(2):
        done = steer("attach", f"{HOST}:{PORT}", user=65534)
        assert done.returncode == 1
        assert "run as root" in done.stderr


def test_group_with_a_program_of_somebody_is_refused(steer: RunSteer) -> None:
    with threads(2), socket.socket() as member:
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind((HOST, PORT))
        member.listen()
        group_program.attach_cbpf(member.fileno(), list(classic.NOTHING))
        said = refused(steer)
        assert "a classic program of " in said
        assert "selects there already" in said
        group_program.detach(member.fileno())


@contextmanager
def steered_by_its_owner() -> Iterator[None]:
    """Three listeners, of which a program of their owner's selects two."""
    with running(sys.executable, path("selects_by_its_own"), HOST, str(PORT)) as server:
        assert line_of(server) == "here"
        assert answers(40) == {"0": 20, "1": 20}
        yield


def test_program_of_somebody_is_replaced_only_if_asked_for(steer: RunSteer) -> None:
    with steered_by_its_owner():
        assert "--replace takes its place, and puts it back" in refused(steer)
        assert answers(40) == {"0": 20, "1": 20}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_replaced_program_is_put_back_with_its_sockets(attach: Attach, how: int) -> None:
    with steered_by_its_owner():
        attached = attach("--replace", "--policy", "round-robin")
        assert is_even(answers(60), 3, len(CPUS))
        assert attached.stop(how) == 0
        assert answers(40) == {"0": 20, "1": 20}


@pytest.mark.needs("tracing")
def test_guard_puts_a_replaced_program_back_with_its_sockets(attach: Attach) -> None:
    with steered_by_its_owner():
        attached = attach("--replace", "--policy", "round-robin")
        assert is_even(answers(60), 3, len(CPUS))
        attached.send_signal(signal.SIGKILL)
        attached.wait()
        eventually(lambda: has_ended(attached))
        assert "the program that was there before selects again" in attached.log
        assert answers(40) == {"0": 20, "1": 20}


@contextmanager
def selects_the_second(instructions: int) -> Iterator[None]:
    """Two listeners, of which a classic program with so many instructions selects the second."""
    load_1, done = (0x00, 0, 0, 1), (0x16, 0, 0, 0)  # BPF_LD | BPF_IMM, BPF_RET | BPF_A
    with threads(2) as server:
        (inode, held), *_ = holders.find(
            listeners_at(address.parse(f"{HOST}:{PORT}")), [server]
        ).items()
        with holders.borrowed({inode: held}) as lent:
            program = [load_1] * (instructions - 1) + [done]
            group_program.attach_cbpf(lent[inode].fileno(), program)
        assert answers(20) == {"1": 20}
        yield


@pytest.mark.needs("tracing")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("instructions", [2, 4064])
def test_classic_program_is_replaced_and_put_back(
    attach: Attach, steer: RunSteer, how: int, instructions: int
) -> None:
    with selects_the_second(instructions):
        assert "--replace takes its place" in refused(steer)
        attached = attach("--replace", "--policy", "round-robin")
        assert is_even(answers(60), 2, len(CPUS))
        attached.stop(how)
        eventually(lambda: has_ended(attached))
        assert answers(20) == {"1": 20}


def test_listeners_in_another_network_namespace_need_its_name(
    attach: Attach, steer: RunSteer
) -> None:
    with threads(4) as server, network_namespace():
        said = refused(steer)
        assert "but in another" in said
        assert f"--netns {server}" in said
        attached = attach("--netns", str(server), "--policy", "round-robin")
        assert states(attached) == ["ready"] * 4


@pytest.mark.needs("tracing")
def test_detach_ends_and_cleans_up_in_another_network_namespace(
    attach: Attach, steer: RunSteer
) -> None:
    where = f"{HOST}:{PORT}"
    with threads(2) as server:
        for end in (None, killed_with_guard):
            attached = attach()
            if end:
                end(attached)
            with network_namespace():
                done = steer("detach", where, "--netns", str(server))
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"detached {where if end else attached.name}")
            assert not has_program()
            attached.leaves_nothing()


def test_same_address_in_two_network_namespaces_is_two_groups(
    attach: Attach, steer: RunSteer
) -> None:
    where = f"{HOST}:{PORT}"
    with threads(2):
        first = attach(name="first")
        with network_namespace():
            done = steer("detach", where)
            assert done.returncode == 1
            assert (
                "but first does in another network namespace; `steer detach first`" in done.stderr
            )
            with threads(3):
                second = attach(name="second")
                assert states(second) == ["ready"] * 3
                assert steer("detach", where).returncode == 0
                assert second.wait() == 0
        assert states(first) == ["ready"] * 2
        assert steer("detach", where).returncode == 0
        assert first.wait() == 0
