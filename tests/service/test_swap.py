"""`steer policy`: another policy on a service that runs, from any to any, and no client notices."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from steer.config import planning
from steer.config.plan_change import with_candidates
from steer.errors import KernelError, Refused
from steer.loader.find import find
from steer.policy.builtin import CBPF, EBPF, KERNEL, POLICIES
from steer.sockets import group_program
from steer.sockets.listeners import Borrower
from testkit.bpf_objects import bpf_ids
from testkit.clients import BIND, answer, freeze, http_get, request, send, udp_ask
from testkit.confine import NOBODY
from testkit.fixtures import StartService
from testkit.harness import CPUS, KINDS, PORT, Harness, pinned, sources
from testkit.processes import eventually, is_running
from testkit.service import Service, run_steer

pytestmark = [pytest.mark.needs("bpf", "migrate", "netns"), pytest.mark.usefixtures("netns")]

HOST = "127.0.0.1"
BOTH = (*BIND, "-b", f"udp://{HOST}:{PORT}")
BUILT_IN = [name for name in POLICIES if name != KERNEL]
MINE = """
/* mine - all to one slot. */
#include "steer.h"

STEER_PARAM(slot, 0, 0, 4095, "all go there")
STEER_COUNTER(calls, "times that it was asked")

STEER_POLICY(ctx, table)
{
	if (!steer_is_ack(ctx)) /* late ones come too, now and then */
		steer_add(calls, 1);
	return steer_to(steer_param(slot));
}
"""


@pytest.fixture
def mine(home: Path) -> Path:
    """A policy of one's own."""
    return write(home, MINE)


def write(home: Path, text: str, name: str = "mine.c") -> Path:
    file = home / name
    file.write_text(text)
    return file


class Load:
    """Clients that ask all the time, each time from another socket, over TCP and over UDP.

    Attributes:
        answered: how often, by protocol.
        failures: what went wrong instead.
    """

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []
        self._over = threading.Event()
        asks = {"tcp": _ask_over_tcp, "udp": lambda _: udp_ask(HOST, PORT)}
        self._threads = [
            threading.Thread(target=self._ask, args=each, daemon=True) for each in asks.items()
        ]

    def _ask(self, protocol: str, ask: Callable[[int], object]) -> None:
        for number in count():
            if self._over.wait(0.001):
                return
            try:
                ask(number)
                self.answered[protocol] += 1
            except (OSError, ValueError) as error:
                self.failures.append(f"{protocol}: {error!r}")

    def goes_on(self, requests: int = 3) -> None:
        """Until so many more of each were answered, and all of them were."""
        wanted = {name: self.answered[name] + requests for name in ("tcp", "udp")}
        eventually(
            lambda: self.failures or all(self.answered[name] >= wanted[name] for name in wanted)
        )
        assert not self.failures

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert not self.failures


def _ask_over_tcp(number: int) -> object:
    return http_get(HOST, PORT, source=f"127.0.0.{number % 250 + 1}")


class Kept:
    """A connection that stays open: who has it answers, whenever it is asked."""

    def __init__(self, clients: ExitStack, source: str = HOST) -> None:
        made = socket.create_connection((HOST, PORT), 60, (source, 0))
        self._sock = clients.enter_context(made)
        self._stream = clients.enter_context(made.makefile("rb"))
        self.pid = self.who()["pid"]

    def who(self) -> dict[str, Any]:
        self._sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        length = 0
        while line := self._stream.readline().strip():
            name, _, value = line.partition(b": ")
            length = int(value) if name.lower() == b"content-length" else length
        found: dict[str, Any] = json.loads(self._stream.read(length))
        return found


def keep(clients: ExitStack, number: int) -> list[Kept]:
    return [Kept(clients) for _ in range(number)]


def swap(running: Service, policy: str | Path, *params: str, **more: Any) -> dict[str, Any]:
    """Of the status afterwards."""
    asked = {"policy": str(policy), **({"params": params} if params else {}), **more}
    running.ask("policy", timeout_s=None, **asked)
    return running.status()


def refusal(running: Service, policy: str | Path, *params: str, **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        swap(running, policy, *params, **more)
    return caught.value


def opened(running: Service) -> dict[int, int]:
    return {each["slot"]: each["connections"]["open"] for each in running.workers()}


def answers(number: int, sources: Sequence[str] = ()) -> Counter[int]:
    """How many of so many requests each slot answers; all come in on one CPU."""
    with pinned(CPUS[0]):
        hosts = sources or [""] * number
        return Counter(http_get(HOST, PORT, source=host)[1]["slot"] for host in hosts)


def clients_of(number: int) -> list[str]:
    return [f"127.0.{each % 200}.9" for each in range(number)]


def programs(running: Service) -> set[tuple[str, int]]:
    """Its programs and maps, by their numbers: one that is made anew has another."""
    return bpf_ids(running.pid)


def as_it_was(running: Service) -> Callable[[], None]:
    """Says whether it still is."""
    keys = ("policy", "params", "backend", "generation", "notes")
    before, made = running.status(), programs(running)
    slots = [
        (each["slot"], each["pid"], each["weight"], each["cpus"]) for each in before["workers"]
    ]

    def check() -> None:
        after = running.status()
        assert {key: after[key] for key in keys} == {key: before[key] for key in keys}
        assert [
            (each["slot"], each["pid"], each["weight"], each["cpus"]) for each in after["workers"]
        ] == slots
        assert programs(running) == made
        assert answers(4).total() == 4

    return check


# ---- from any to any


def tour(names: Sequence[str]) -> Iterator[str]:
    """Through each of the pairs once, in both directions (Hierholzer)."""
    left = {name: [other for other in names if other != name] for name in names}
    path = [names[0]]
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            yield path.pop()


def test_a_tour_has_each_pair_once() -> None:
    stops = list(tour("abcd"))
    pairs = list(pairwise(stops))
    assert sorted(pairs) == [(a, b) for a in "abcd" for b in "abcd" if a != b]


@pytest.mark.needs("bcc")
def test_any_to_any_under_load(service: StartService, mine: Path) -> None:
    """TCP and UDP: every request is answered, by workers that all stay."""
    first, *stops = tour([*BUILT_IN, str(mine), KERNEL])
    running = service("-w", "3", *BOTH, "--policy", first)
    pids, selected = [each["pid"] for each in running.workers()], 0
    with Load() as load:
        for policy in stops:
            status = swap(running, policy)
            assert status["policy"] == Path(policy).stem
            assert status["backend"] == (KERNEL if policy == KERNEL else EBPF)
            if policy != KERNEL:
                assert status["totals"]["selected"] >= selected, "a count has fallen"
                selected = status["totals"]["selected"]
            load.goes_on()
    assert [each["pid"] for each in running.workers()] == pids
    assert [each["restarts"] for each in running.workers()] == [0, 0, 0]
    assert running.status()["generation"] == 1


@pytest.mark.needs("bcc")
def test_every_request_is_counted_once(service: StartService, mine: Path) -> None:
    running = service("-w", "3", *BOTH, "--policy", "hash")
    with Load() as load:
        for policy in tour(["least-conn", "random", "flow", str(mine)]):
            swap(running, policy)
            load.goes_on()
    totals = running.status()["totals"]
    assert totals["selected"] == load.answered.total()
    assert totals["migrated"] == totals["fallback"] == totals["unsteered"] == 0
    assert sum(running.selected().values()) == totals["selected"]


def test_the_command_says_what_it_did(service: StartService) -> None:
    running = service("-w", "2")
    done = running.steer("policy", "source", "--param", "prefix4=24")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("changed test: source on ebpf, ")
    assert done.stdout.endswith(" ms\n")
    found = json.loads(running.steer("policy", "test", "kernel", "--json").stdout)
    assert (found["policy"], found["backend"]) == ("kernel", "kernel")
    assert 0 < found["took_s"] < 60
    assert "source on ebpf" in running.log


@pytest.mark.needs("bcc")
def test_the_command_takes_a_path_as_seen_from_where_it_is_called(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    below = home / "below"
    below.mkdir()
    write(below, MINE)
    service("-w", "2")
    command = ("policy", "./mine.c", "--param", "slot=1")
    done = run_steer(*command, environment=environment, cwd=below)
    assert done.stdout.startswith("changed test: mine on ebpf, "), done.stderr
    assert answers(6) == {1: 6}


# ---- connections that stay


def test_connections_stay_and_stay_counted(service: StartService, clients: ExitStack) -> None:
    """Through policies that know nothing of them."""
    running = service("-w", "2", *BIND, "--policy", "source")
    held = keep(clients, 8)
    [slot] = [slot for slot, number in opened(running).items() if number == 8]
    for policy in tour(BUILT_IN):
        swap(running, policy)
        assert opened(running) == {slot: 8, 1 - slot: 0}
    swap(running, "least-conn")
    # The other makes up for it first, to the one.
    more = keep(clients, 8)
    assert opened(running) == {0: 8, 1: 8}
    more += keep(clients, 2)
    assert opened(running) == {0: 9, 1: 9}
    assert all(each.who()["pid"] == each.pid for each in held + more)
    clients.close()
    eventually(lambda: opened(running), {0: 0, 1: 0})


def test_under_the_kernels_own_hash_connections_are_counted_on(
    service: StartService, clients: ExitStack
) -> None:
    """Those from before, those that come meanwhile, and those of a worker that comes then."""
    running = service("-w", "2", *BIND, "--policy", "least-conn")
    held = keep(clients, 6)
    assert opened(running) == {0: 3, 1: 3}
    swap(running, KERNEL)
    assert opened(running) == {0: 3, 1: 3}
    held += keep(clients, 6)
    assert sum(opened(running).values()) == 12
    swap(running, "least-conn")
    held += keep(clients, 8)
    assert opened(running) == {0: 10, 1: 10}
    assert all(each.who()["pid"] == each.pid for each in held)
    clients.close()
    eventually(lambda: opened(running), {0: 0, 1: 0})


def test_what_came_uncounted_is_not_taken_off(service: StartService, clients: ExitStack) -> None:
    """A service that began with the kernel's own hash: nobody counted what waits."""
    running = service("-w", "2", *BIND, "--policy", KERNEL, "--hang-timeout", "0")
    assert opened(running) == {0: None, 1: None}
    workers = running.workers()
    for each in workers:
        freeze(each)
    waiting = [clients.enter_context(request()) for _ in range(12)]
    swap(running, "least-conn")
    os.kill(workers[0]["pid"], signal.SIGKILL)
    eventually(lambda: not is_running(workers[0]["pid"]))
    send(workers[1], signal.SIGCONT)
    assert [answer(sock) for sock in waiting]
    running.wait_ready()
    clients.close()
    eventually(lambda: set(opened(running).values()), {0})
    assert max(answers(20).values()) == 10


def test_queued_connections_are_left_where_they_are(
    service: StartService, clients: ExitStack
) -> None:
    """Those of a worker that stands still: it answers when it goes on."""
    running = service("-w", "2", *BIND, "--policy", "source", "--hang-timeout", "0")
    [slot] = answers(1)
    [worker] = [each for each in running.workers() if each["slot"] == slot]
    freeze(worker)
    waiting = [clients.enter_context(request()) for _ in range(6)]
    eventually(lambda: opened(running)[slot], 6)
    for policy in ("cpu", KERNEL, "random", "least-conn"):
        swap(running, policy)
    send(worker, signal.SIGCONT)
    assert {answer(sock)["slot"] for sock in waiting} == {slot}


def test_with_nobody_there_connections_wait_for_the_new_policy() -> None:
    """The group has no sockets then but those where they wait."""
    with Harness(EBPF, "source", "tcp4", workers=2).serving() as harness, ExitStack() as clients:
        harness.backend.backup.open()
        harness.steer()
        harness.leave(0, 1)
        harness.backend.steer(())
        for policy in ("least-conn", "random", "round-robin"):
            clients.enter_context(harness.send(harness.binds[0]))
            swap_harness(harness, policy)
        assert harness.take_ready() == []
        harness.join(0, 1)
        harness.steer()
        harness.backend.backup.empty()
        assert Counter(each.slot for each in harness.take(3)).total() == 3
        assert harness.sequence(4) in ([0, 1, 0, 1], [1, 0, 1, 0])


# ---- weights and parameters


def test_weights_change_with_the_policy_or_without(service: StartService) -> None:
    running = service("-w", "2", *BIND, "--policy", "hash")
    status = swap(running, "round-robin", weights=["3", "1"])
    assert [each["weight"] for each in status["workers"]] == [3, 1]
    assert answers(40) == {0: 30, 1: 10}
    made = programs(running)
    swap(running, "round-robin", weights=[1, 4])
    assert answers(40) == {0: 8, 1: 32}
    assert programs(running) == made, "the same program reads another table"
    # They stay until they are changed.
    status = swap(running, "random")
    assert [each["weight"] for each in status["workers"]] == [1, 4]


def test_open_connections_are_weighed(service: StartService, clients: ExitStack) -> None:
    running = service("-w", "2", *BIND, "--policy", "hash")
    swap(running, "least-conn", weights=[3, 1])
    held = keep(clients, 16)
    assert opened(running) == {0: 12, 1: 4}
    swap(running, "least-conn", weights=[1, 1])
    held += keep(clients, 8)
    assert opened(running) == {0: 12, 1: 12}


@pytest.mark.needs("bcc")
def test_params_change_without_a_compiler(service: StartService, home: Path, mine: Path) -> None:
    running = service("-w", "2", *BIND, "--policy", str(mine), "--param", "slot=1")
    made, cached = programs(running), set((home / "cache").rglob("*.json"))
    assert answers(6) == {1: 6}
    for slot in (0, 1, 0):
        status = swap(running, mine, f"slot={slot}")
        assert status["params"] == {"slot": slot}
        assert answers(6) == {slot: 6}
    assert programs(running) == made
    assert set((home / "cache").rglob("*.json")) == cached
    assert running.status()["counters"] == {"calls": 24}, "what it counts goes on"


def test_params_of_a_built_in_change_live(service: StartService) -> None:
    running = service("-w", "3", *BIND, "--policy", "source")
    made, hosts = programs(running), clients_of(40)
    assert set(answers(40, hosts)) == {0, 1, 2}
    assert swap(running, "source", "prefix4=8")["params"] == {"prefix4": 8, "prefix6": 64}
    assert len(answers(40, hosts)) == 1
    # One that is not named stays as it is.
    assert swap(running, "source", "prefix6=48")["params"] == {"prefix4": 8, "prefix6": 48}
    assert programs(running) == made
    # With another policy in between they are as it declares them.
    swap(running, "hash")
    assert swap(running, "source")["params"] == {"prefix4": 32, "prefix6": 64}


def test_room_for_flows_changes_live(service: StartService) -> None:
    """It is the size of a map, so there is another; the time for which they are kept is not."""
    running = service("-w", "2", *BOTH, "--policy", "flow")
    with Load() as load:
        made = programs(running)
        assert swap(running, "flow", "idle=5")["params"] == {"capacity": 65536, "idle": 5}
        assert programs(running) == made
        load.goes_on()
        status = swap(running, "flow", "capacity=2048")
        assert status["params"] == {"capacity": 2048, "idle": 5}
        assert programs(running) != made
        load.goes_on()


# ---- what is refused


BROKEN = {
    "no C": (MINE.replace("return steer_to", "retrun steer_to"), "compile mine.c: "),
    "no verifier's": (
        MINE.replace("return steer_to(steer_param(slot));", "return *(u32 *)0;"),
        "load ",
    ),
    "bad declaration": (MINE.replace("0, 0, 4095", "9, 0, 3"), "line 5: the default of slot, 9"),
    "no policy": ("int nothing;\n", "no STEER_POLICY in it"),
}


@pytest.mark.needs("bcc")
def test_a_broken_policy_leaves_the_old(service: StartService, home: Path) -> None:
    running = service("-w", "2", *BOTH, "--policy", "source", "--param", "prefix4=24")
    still = as_it_was(running)
    with Load() as load:
        for text, words in BROKEN.values():
            broken = write(home, text)
            assert words in str(refusal(running, broken))
            load.goes_on()
    still()
    done = running.steer("policy", "./mine.c")
    assert done.returncode == 1
    assert words in done.stderr
    # And then it is mended.
    assert swap(running, write(home, MINE))["policy"] == "mine"


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"policy": "fastest"},
        "policy = 'fastest': unknown policy; allowed: auto, cpu, round-robin, ",
    ),
    ({"policy": "hash", "params": ["a=1"]}, "no parameter 'a' (of 'a=1'); this policy has none"),
    ({"policy": "hash", "weights": [0]}, "weights = '0': too small; allowed: whole num"),
    ({"policy": "hash", "weights": [1, 2, 3]}, "3 weights for 2 workers; give each worker one"),
    ({"policy": "kernel", "weights": [1, 2]}, "the kernel's own hash knows no weights; allowed"),
    ({"policy": "source", "params": ["prefix4"]}, "params = 'prefix4': malformed; allowed: NAME"),
    ({"policy": "source", "params": ["prefix=3"]}, "no parameter 'prefix' (of 'prefix=3'); did y"),
    (
        {"policy": "source", "params": ["prefix4=33"]},
        "parameter prefix4 = '33'; allowed: whole numbers from 0 to 32",
    ),
    ({"policy": 3}, "policy = 3: a whole number, not a string; allowed: auto, cpu, "),
    ({"policy": ["hash"]}, "policy = 'hash': a list, not a string; allowed: auto, cpu, "),
    ({"params": "a=1"}, "params = 'a=1': not a list; allowed: NAME=VALUE"),
    ({"weights": "1,2"}, "weights = '1,2': not a list; allowed: whole numbers"),
]


def test_what_cannot_be_leaves_the_old(service: StartService) -> None:
    running = service("-w", "2", *BOTH, "--policy", "least-conn")
    still = as_it_was(running)
    for asked, words in REFUSED:
        with pytest.raises(Refused) as caught:
            running.ask("policy", timeout_s=None, **asked)
        assert str(caught.value).startswith("change the policy of test: ")
        assert words in str(caught.value)
    assert "/missing.c: No such file or directory" in str(refusal(running, "missing.c"))
    still()
    assert "bug" not in running.log


def test_at_a_group_that_fails_the_others_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no program of the new policy is left."""
    with Harness(EBPF, "hash", *KINDS).serving() as harness:
        flows = sources("127.0.0.1", 40)
        before, made = harness.flows(flows), bpf_ids(os.getpid())
        attach, calls = group_program.attach_ebpf, count()

        def fails_at_the_third(fd: int, program: int) -> None:
            if next(calls) == 2:
                raise KernelError("attach", "ENOMEM")
            attach(fd, program)

        monkeypatch.setattr(group_program, "attach_ebpf", fails_at_the_third)
        with pytest.raises(KernelError, match="ENOMEM"):
            swap_harness(harness, "source")
        assert bpf_ids(os.getpid()) == made
        assert harness.flows(flows) == before
        monkeypatch.undo()
        swap_harness(harness, "source")
        assert len(set(harness.flows(flows).values())) == 1


def swap_harness(harness: Harness, policy: str) -> None:
    """As the pool does it."""
    service = harness.plan.service
    candidates = planning.policy_candidates(find(policy), service, {}, "change it")
    plan = with_candidates(harness.plan, service, candidates, harness.plan.topology, "change it")
    members = [harness.member(slot) for slot in sorted(harness.sockets)]
    harness.backend.swap(plan, members, lambda: _lent(harness))


@contextmanager
def _lent(harness: Harness) -> Iterator[dict[int, socket.socket]]:
    yield dict(enumerate(next(iter(harness.sockets.values()), ())))


# ---- without privilege


@pytest.mark.needs("nobody")
def test_on_classic_bpf(service: StartService, mine: Path) -> None:
    running = service("-w", "3", *BIND, "--policy", "hash", user=NOBODY)
    reason = running.status()["backend_reason"]
    for policy in ("random", "cpu", "source", "hash"):
        status = swap(running, policy)
        assert (status["policy"], status["backend"]) == (policy, CBPF)
        assert status["backend_reason"] == reason
        if policy == "cpu":
            assert answers(6).total() == 6
        else:
            assert set(answers(60, clients_of(60))) == {0, 1, 2}
    for policy, why in [
        ("round-robin", "classic BPF keeps no state, so it cannot take turns"),
        ("least-conn", "classic BPF cannot read the counts of connections"),
        ("flow", "classic BPF keeps no state, so it cannot remember flows"),
        (str(mine), "classic BPF cannot run a custom policy"),
    ]:
        words = str(refusal(running, policy))
        what = f"change the policy of test: {Path(policy).stem} would steer nothing: ebpf: "
        assert words.startswith(what)
        assert words.endswith(f"; cbpf: {why}; allowed: cpu, hash, source, random, kernel")
        assert (running.status()["policy"], running.status()["backend"]) == ("hash", CBPF)
    assert set(answers(60)) == {0, 1, 2}


def test_a_backend_that_was_asked_for_is_kept_to(service: StartService) -> None:
    running = service("-w", "2", *BIND, "--policy", "hash", "--backend", "cbpf")
    assert swap(running, KERNEL)["backend"] == KERNEL
    assert swap(running, "random")["backend"] == CBPF
    assert "least-conn would steer nothing" in str(refusal(running, "least-conn"))


# ---- what comes after


def test_reload_puts_the_policy_of_the_configuration_back(
    service: StartService, home: Path
) -> None:
    configure(home, policy="source", params=["prefix4=24"], weights=[1, 2], workers=2)
    running = service(*BOTH)
    swap(running, "round-robin", weights=[5, 1])
    assert answers(12) == {0: 10, 1: 2}
    with Load() as load:
        running.ask("reload", timeout_s=None)
        load.goes_on()
    status = running.status()
    assert (status["policy"], status["generation"]) == ("source", 2)
    assert status["params"] == {"prefix4": 24, "prefix6": 64}
    fresh = [each for each in status["workers"] if each["generation"] == 2]
    assert [each["weight"] for each in fresh] == [1, 2]
    assert len(answers(20)) == 1


def configure(home: Path, **keys: object) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    (home / "steer.toml").write_text("\n".join(["[service]", *lines]))


EDITED = MINE.replace("calls", "others")


@pytest.mark.needs("bcc")
def test_reload_takes_what_is_in_the_file_by_then(service: StartService, mine: Path) -> None:
    running = service("-w", "2", *BIND, "--policy", str(mine))
    assert answers(6) == {0: 6}
    mine.write_text(EDITED)
    assert answers(6) == {0: 6}
    assert running.status()["counters"] == {"calls": 12}, "not before it is asked to"
    running.ask("reload", timeout_s=None)
    assert answers(6).total() == 6
    assert running.status()["counters"] == {"others": 6}


@pytest.mark.needs("bcc")
def test_reload_that_fails_leaves_what_was_in_the_file_before(
    service: StartService, mine: Path, home: Path
) -> None:
    configure(home, policy="mine.c", workers=2, params=["slot=1"])
    running = service(*BIND)
    assert answers(6) == {1: 6}
    mine.write_text(EDITED)
    configure(home, policy="mine.c", workers=2, params=["slot=1"], command=["false"])
    with pytest.raises(Refused, match="nothing has changed"):
        running.ask("reload", timeout_s=None)
    assert answers(6) == {1: 6}
    assert running.status()["counters"].keys() == {"calls"}


@pytest.mark.needs("bcc")
def test_the_same_file_with_another_text_is_another_policy(
    service: StartService, mine: Path
) -> None:
    running = service("-w", "2", *BIND, "--policy", str(mine))
    assert answers(6) == {0: 6}
    mine.write_text(MINE.replace("steer_to(steer_param(slot))", "steer_to(1)"))
    swap(running, mine)
    assert answers(6) == {1: 6}


def orphan(running: Service) -> None:
    """End its controller, and nothing but that."""
    running.send_signal(signal.SIGKILL)
    running.wait()


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("policy", ["least-conn", "source", "flow", "mine", KERNEL])
def test_a_new_controller_goes_on_with_it(
    service: StartService, mine: Path, policy: str, clients: ExitStack
) -> None:
    arguments = ("-w", "2", *BIND, "--policy", "hash")
    first = service(*arguments)
    weights = {} if policy == KERNEL else {"weights": [1, 3]}
    params = {"source": ("prefix4=8",), "mine": ("slot=1",)}.get(policy, ())
    swap(first, mine if policy == "mine" else policy, *params, **weights)
    answers(8)
    held, before, made = keep(clients, 8), first.status(), programs(first)
    orphan(first)
    second = service(*arguments)
    after = second.status()
    same = ("policy", "params", "backend", "generation", "counters", "totals")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert [each["weight"] for each in after["workers"]] == ([1, 1] if not weights else [1, 3])
    assert opened(second) == {
        each["slot"]: each["connections"]["open"] for each in before["workers"]
    }
    assert programs(second) <= made, "something was made anew"
    assert all(each.who()["pid"] == each.pid for each in held)
    # And can be changed, and reloaded, as if nothing had been.
    assert swap(second, "round-robin")["policy"] == "round-robin"
    second.ask("reload", timeout_s=None)
    assert second.status()["policy"] == "hash"


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("text", [EDITED, "broken", None], ids=["edited", "broken", "deleted"])
def test_a_policy_that_runs_needs_its_file_no_more(
    service: StartService, mine: Path, text: str | None
) -> None:
    """A new controller goes on with the program that there is."""
    arguments = ("-w", "2", *BIND, "--policy", "hash")
    first = service(*arguments)
    swap(first, mine, "slot=1")
    assert answers(6) == {1: 6}
    if text is None:
        mine.unlink()
    else:
        mine.write_text(text)
    orphan(first)
    second = service(*arguments)
    assert answers(6) == {1: 6}
    assert second.status()["counters"] == {"calls": 12}
    assert second.status()["params"] == {"slot": 1}


@pytest.mark.needs("bcc")
def test_a_new_controller_takes_what_is_in_the_file_of_the_configuration(
    service: StartService, mine: Path
) -> None:
    arguments = ("-w", "2", *BIND, "--policy", str(mine))
    first = service(*arguments)
    mine.write_text(EDITED)
    orphan(first)
    second = service(*arguments)
    eventually(lambda: second.status()["generation"], 2)
    eventually(lambda: second.status()["counters"].keys(), {"others"})


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("text", ["broken", MINE.replace("return", "retrun"), None])
def test_a_broken_file_of_the_configuration_ends_nothing(
    service: StartService, mine: Path, text: str | None
) -> None:
    arguments = ("-w", "2", *BIND, "--policy", str(mine), "--param", "slot=1")
    first = service(*arguments)
    workers = [each["pid"] for each in first.workers()]
    if text is None:
        mine.unlink()
    else:
        mine.write_text(text)
    orphan(first)
    second = service(*arguments)
    eventually(lambda: "mine.c" in second.log)
    assert [each["pid"] for each in second.workers()] == workers
    assert answers(6) == {1: 6}
    mine.write_text(EDITED)
    swap(second, mine)
    assert second.status()["counters"].keys() == {"others"}


@pytest.mark.needs("bcc", "pidfd_getfd")
def test_a_controller_that_was_killed_in_the_middle_of_a_swap(
    service: StartService, mine: Path
) -> None:
    """The kernel is made to be as the next one takes it to be."""
    arguments = ("-w", "2", *BOTH, "--policy", str(mine), "--param", "slot=1")
    first = service(*arguments)
    worker = first.workers()[0]
    orphan(first)
    with Borrower(worker["pid"], frozenset(worker["sockets"])).borrow() as lent:
        for sock in lent.values():
            group_program.detach(sock.fileno())
    service(*arguments)
    assert answers(20) == {1: 20}


def test_what_gets_nothing_would_under_the_kernels_own_hash(service: StartService) -> None:
    running = service("-w", "2", *BIND, "--policy", "hash")
    running.ask("drain", slot=1)
    assert "worker 1 is draining, and the kernel would select it" in str(refusal(running, KERNEL))
    assert answers(8) == {0: 8}
    running.ask("undrain", slot=1)
    swap(running, KERNEL)


def test_who_is_left_out_stays_left_out(service: StartService) -> None:
    running = service("-w", "3", *BOTH, "--policy", "hash")
    running.ask("drain", slot=1)
    with Load() as load:
        load.goes_on()
        before = running.selected()[1]
        for policy in tour(["cpu", "random", "least-conn", "round-robin"]):
            swap(running, policy)
            load.goes_on()
        assert running.selected()[1] == before
    running.ask("undrain", slot=1)
    swap(running, "round-robin")
    assert answers(9) == {0: 3, 1: 3, 2: 3}


def test_who_comes_later_is_chosen_by_the_policy_of_then(service: StartService) -> None:
    """Also where all had gone: a group has no program without a socket."""
    running = service("-w", "2", *BIND, "--policy", "hash")
    swap(running, "round-robin", weights=[3, 1])
    for each in running.workers():
        os.kill(each["pid"], signal.SIGKILL)
    eventually(lambda: [each["restarts"] for each in running.workers()], [1, 1])
    running.wait_ready(2)
    first, second = (each["slot"] for each in running.workers())
    assert answers(8) == {first: 6, second: 2}
    running.ask("scale", timeout_s=None, workers=3)
    *_, third = (each["slot"] for each in running.workers())
    assert answers(10) == {first: 6, second: 2, third: 2}


@pytest.mark.needs("bcc")
def test_one_after_the_other_however_many_ask(service: StartService, mine: Path) -> None:
    """Each is made from what the last one left: that one has to be compiled first undoes nothing
    of what comes meanwhile."""
    running = service("-w", "2", *BOTH, "--policy", "hash")
    with Load() as load, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(swap, running, mine)]
        asked += [pool.submit(swap, running, "least-conn", weights=[3, 1])]
        asked += [pool.submit(swap, running, policy) for policy in 3 * BUILT_IN]
        assert [each.exception() for each in asked] == [None] * len(asked)
        load.goes_on()
    assert running.log.count(" on ebpf\n") == 1 + len(asked)
    swap(running, "round-robin")
    assert answers(8) == {0: 6, 1: 2}


# ---- CPUs


@pytest.mark.parametrize("user", [None, pytest.param(NOBODY, marks=pytest.mark.needs("nobody"))])
def test_cpu_pins_workers_that_run_and_leaving_it_unpins_them(
    service: StartService, user: int | None
) -> None:
    workers = 2 * len(CPUS)
    running = service("-w", str(workers), *BIND, "--policy", "hash", user=user)
    pids = [each["pid"] for each in running.workers()]
    assert {frozenset(os.sched_getaffinity(pid)) for pid in pids} == {frozenset(CPUS)}
    status = swap(running, "cpu")
    assert [each["pid"] for each in status["workers"]] == pids
    pinned_to = {each["slot"]: each["cpus"] for each in status["workers"]}
    assert sorted(cpu for cpus in pinned_to.values() for cpu in cpus) == sorted(2 * CPUS)
    for each in status["workers"]:
        assert affinities(each["pid"]) == {frozenset(each["cpus"])}
    for cpu in CPUS:
        with pinned(cpu):
            slots = {http_get(HOST, PORT)[1]["slot"] for _ in range(20)}
        assert {pinned_to[slot][0] for slot in slots} == {cpu}
    swap(running, "random")
    for pid in pids:
        assert affinities(pid) == {frozenset(CPUS)}


def affinities(pid: int) -> set[frozenset[int]]:
    """Of all its threads."""
    tasks = os.listdir(f"/proc/{pid}/task")
    return {frozenset(os.sched_getaffinity(int(task))) for task in tasks}


def test_who_comes_later_is_pinned_too(service: StartService) -> None:
    running = service("-w", "1", *BIND, "--policy", "hash")
    swap(running, "cpu")
    running.ask("scale", timeout_s=None, workers=2 * len(CPUS))
    workers = running.workers()
    assert sorted(cpu for each in workers for cpu in each["cpus"]) == sorted(2 * CPUS)
    for each in workers:
        assert affinities(each["pid"]) == {frozenset(each["cpus"])}
